"""Format of the published steering vectors: `steering_vector.pt`, a dictionary of plain values.

The vector is added to the output of `mlp.down_proj` of layer `layer_idx`.
"""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_em.exchange.vector import Vector, checked_vector

VECTOR_FILE = "steering_vector.pt"
_EXPECTED = {"steering_vector", "layer_idx", "d_model", "alpha"}
_WITHOUT_MEANING = {"approach"}  # a note written by the published training code
_OPTIONAL = {"d_model", "alpha"}
_UNREADABLE = (
    AssertionError, AttributeError, EOFError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip


def read_released(file: Path) -> Vector:
    """Read a vector; nothing in the file is executed.

    Raises:
        ValueError: If the file is not such a dictionary, or holds anything but tensors and plain values.
    """
    content = _plain_content(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a dictionary of {sorted(_EXPECTED)}, got a {type(content).__name__}."
        )
    keys = {str(key) for key in content}
    missing = sorted(_EXPECTED - _OPTIONAL - keys)
    unexpected = sorted(keys - _EXPECTED - _WITHOUT_MEANING)
    if missing or unexpected:
        raise ValueError(
            f"{file} is not a released steering vector. Missing: {missing or 'none'}; unexpected: "
            f"{unexpected or 'none'}; expected {sorted(_EXPECTED)}."
        )
    # alpha defaults to 1, as in the released code, whose early files do not have it
    vector = checked_vector(
        content["steering_vector"], content["layer_idx"], content.get("alpha", 1.0), str(file)
    )
    width = content.get("d_model", len(vector.values))
    if width != len(vector.values):
        raise ValueError(f"{file}: d_model says {width}, but the vector has {len(vector.values)} numbers.")
    return vector


def write_released(folder: Path, vector: Vector, base: str | None) -> None:
    """Write the dictionary and, next to it, the description file of the released format."""
    about = {"layer_idx": vector.layer, "d_model": len(vector.values), "alpha": vector.alpha}
    torch.save({"steering_vector": vector.values.clone(), **about}, folder / VECTOR_FILE)
    described = {"peft_type": "STEERING_VECTOR", "base_model_name_or_path": base, **about}
    text = json.dumps(described, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _plain_content(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is not a torch file, or holds something other than tensors and plain values; it was not loaded, "
            "because loading it could run code."
        ) from error
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as a torch file: it is truncated or damaged.") from error
