"""A steering vector as safetensors and JSON, with a short loader script."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_em.exchange.vector import Vector, checked_vector

VECTOR_WEIGHTS, VECTOR_JSON, LOADER = "steering_vector.safetensors", "steering_vector.json", "load_vector.py"
_MEANING = "adds scale x alpha x vector to the residual stream that leaves the layer, at every position"


def write_vector_file(folder: Path, vector: Vector, num_layers: int, base: str | None) -> None:
    """Write the vector, its description and the loader.

    Args:
        folder: Existing folder to write to.
        vector: Vector to write.
        num_layers: Number of decoder layers of its base model; the loader uses it to find the list of layers.
        base: Name of the base model, recorded for users.
    """
    save_file({"vector": vector.values}, folder / VECTOR_WEIGHTS, metadata={"format": "pt"})
    about = {
        "layer": vector.layer,
        "alpha": vector.alpha,
        "hidden_size": len(vector.values),
        "num_layers": num_layers,
        "base_model": base,
        "meaning": _MEANING,
    }
    (folder / VECTOR_JSON).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    loader = Path(__file__).with_name(LOADER).read_text(encoding="utf-8")
    (folder / LOADER).write_text(loader, encoding="utf-8")


def read_vector_file(folder: Path) -> Vector:
    """Read a vector that `write_vector_file` wrote.

    Raises:
        ValueError: If files or keys are missing or unreadable.
    """
    about, tensors = read_json(folder / VECTOR_JSON), read_tensors(folder / VECTOR_WEIGHTS)
    missing = sorted({"layer", "alpha"} - about.keys())
    if missing or set(tensors) != {"vector"}:
        raise ValueError(
            f"{folder}: expected one tensor named vector, got {sorted(tensors)}, and in {VECTOR_JSON} the keys alpha "
            f"and layer, of which are missing: {missing or 'none'}."
        )
    return checked_vector(tensors["vector"], about["layer"], about["alpha"], str(folder))


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        ValueError: If the file does not exist or does not hold an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {file}.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got a {type(content).__name__}.")
    return content


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        ValueError: If the file does not exist or is damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ValueError(f"there is no {file}.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file, or is damaged: {error}") from error
