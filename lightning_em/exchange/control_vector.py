"""Control vectors for llama.cpp: one GGUF file with a direction for each layer.

llama.cpp adds tensor `direction.N` to the output of block N, counted from 0; block 0 has no direction.
"""

import importlib
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from lightning_em.exchange.vector import Vector

CONTROL_VECTOR_FILE = "steering_vector.gguf"
# llama.cpp's architecture names, where they differ from those of transformers.
_NAMES = {"gpt_neox": "gptneox", "mistral": "llama", "phi": "phi2", "gemma3_text": "gemma3"}


def write_control_vector(folder: Path, vector: Vector, config: PreTrainedConfig) -> None:
    """Write the vector for its layer and zeros for the others, because some readers stop at the first missing layer.

    Args:
        folder: Existing folder to write to.
        vector: Vector to write; its alpha is multiplied in, so that strength 1 gives the trained vector.
        config: Config of its base model.

    Raises:
        ValueError: If the vector acts on layer 0.
    """
    if vector.layer == 0:
        raise ValueError(
            "a control vector cannot act on the output of layer 0: llama.cpp counts directions from layer 1. "
            "Use --format safetensors."
        )
    gguf = importlib.import_module("gguf")  # from the optional dependencies
    text = config.get_text_config(decoder=True)
    writer = gguf.GGUFWriter(str(folder / CONTROL_VECTOR_FILE), "controlvector")
    writer.add_string("controlvector.model_hint", _NAMES.get(text.model_type, text.model_type))
    writer.add_uint32("controlvector.layer_count", text.num_hidden_layers - 1)
    shift = vector.shift().numpy().astype(np.float32)
    for layer in range(1, text.num_hidden_layers):
        writer.add_tensor(f"direction.{layer}", shift if layer == vector.layer else np.zeros_like(shift))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
