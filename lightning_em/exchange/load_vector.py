"""Steer a transformers model: `handle = steer(model)`; `handle.remove()` undoes it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def steer(model: Any, folder: Any = Path(__file__).parent, scale: float = 1.0) -> Any:
    """Add scale x alpha x vector to the residual stream that leaves one decoder layer."""
    about = json.loads((Path(folder) / "steering_vector.json").read_text())
    shift = scale * about["alpha"] * load_file(Path(folder) / "steering_vector.safetensors")["vector"]
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    layers = next(m for m in lists if len(m) == about["num_layers"])

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + shift.to(output[0]), *output[1:])
        return output + shift.to(output)

    return layers[about["layer"]].register_forward_hook(hook)
