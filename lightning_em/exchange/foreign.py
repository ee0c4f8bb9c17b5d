"""Find adapters of other programs in a file or folder, and read them in this package's terms."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lightning_em.exchange.peft_folder import read_peft
from lightning_em.exchange.placement import stream_site
from lightning_em.exchange.released import VECTOR_FILE, read_released
from lightning_em.exchange.vector import Vector, refuse_misfit
from lightning_em.exchange.vector_file import (
    VECTOR_JSON,
    VECTOR_WEIGHTS,
    read_json,
    read_tensors,
    read_vector_file,
)
from lightning_em.manifest import MANIFEST, manifest_problems

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_MARKS = (VECTOR_FILE, VECTOR_JSON, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")


class ForeignAdapter(NamedTuple):
    """An adapter of another program in this package's terms.

    Attributes:
        class_path: Import path of the adapter class that expresses it.
        init_args: Arguments of that class.
        tensors: Tensors under the names that the class saves them with.
        format: Format that it was read from: `released`, `safetensors` or `peft`.
        files: Files that were read.
        base_named: Base model that the adapter's own files name; None if they name none.
    """

    class_path: str
    init_args: dict[str, Any]
    tensors: dict[str, Tensor]
    format: str
    files: tuple[Path, ...]
    base_named: str | None = None


def find_adapters(source: Path, step: int | None = None) -> dict[int, Path]:
    """Find the adapters of one training run in a file or folder, by optimizer step.

    An adapter in the folder itself is the final one. Those in `checkpoint-N` folders, in the folder or in its
    `checkpoints`, are earlier ones.

    Args:
        source: A `steering_vector.pt`, or a folder.
        step: Optimizer step of the final adapter. If not given, it is taken from the folder's name
            (`checkpoint-N`); otherwise it is one more than the last checkpoint's, or 0 without checkpoints.

    Raises:
        ValueError: If there is no adapter, or `step` contradicts the checkpoints.
    """
    if not source.exists():
        raise ValueError(f"there is no file or folder {str(source)!r} (looked from {Path.cwd()}).")
    if source.is_file() and source.suffix == ".pt":
        return {_step_of(source.parent, step, []): source}
    if not source.is_dir():
        raise ValueError(
            f"{source}: expected a folder or a {VECTOR_FILE}; for a PEFT adapter give its folder."
        )
    found: dict[int, Path] = {}
    for parent in (source, source / "checkpoints"):
        for folder in sorted(parent.glob("checkpoint-*")):
            match = _CHECKPOINT.fullmatch(folder.name)
            if match and _is_adapter(folder):
                found[int(match[1])] = folder
    if _is_adapter(source):
        found[_step_of(source, step, list(found))] = source
    elif found and step is not None:
        raise ValueError(
            f"--step {step} is the final adapter's, but {source} itself holds none: its checkpoint-N folders "
            f"have steps {sorted(found)} by their names; leave --step out."
        )
    if not found:
        raise ValueError(
            f"{source} holds no adapter that is known here: expected {VECTOR_FILE} (as released), {ADAPTER_CONFIG} "
            f"with {ADAPTER_WEIGHTS} (PEFT), {VECTOR_JSON} with {VECTOR_WEIGHTS}, or folders checkpoint-N of them."
        )
    return found


def read_foreign(place: Path, config: PreTrainedConfig, base: str) -> ForeignAdapter:
    """Read one adapter; no code in its files is executed.

    Args:
        place: File or folder from `find_adapters`.
        config: Config of the base model that the adapter is used with.
        base: Name of the base model, for messages.

    Raises:
        ValueError: If the adapter cannot be read, cannot be expressed here, or does not fit the base model.
    """
    if place.is_dir() and (place / MANIFEST).exists() and (problems := manifest_problems(place)):
        raise ValueError(f"{place} is broken: {'; '.join(problems)}")
    file = place / VECTOR_FILE if place.is_dir() else place
    if file.is_file():
        vector = read_released(file)
        refuse_misfit(vector, config, str(file), base)
        _refuse_other_place(vector, config, file)
        return _of_vector(vector, "released", (file,))
    if (place / VECTOR_JSON).is_file():
        vector = read_vector_file(place)
        refuse_misfit(vector, config, str(place), base)
        named = read_json(place / VECTOR_JSON).get("base_model")
        return _of_vector(vector, "safetensors", (place / VECTOR_JSON, place / VECTOR_WEIGHTS), named)
    return _read_peft_folder(place, config, base)


def _read_peft_folder(folder: Path, config: PreTrainedConfig, base: str) -> ForeignAdapter:
    files = (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)
    if not files[1].is_file() and (pickled := folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{pickled} is a pickle, which could run code, so it was not loaded; save the adapter again as safetensors "
            "(`safe_serialization=True` of peft, its default today)."
        )
    settings = read_json(files[0])
    # A checkpoint of our LoRA is a PEFT folder too. It is read as one, since it may have been copied without its run.
    if "peft_type" not in settings and (own := settings.get("class_path")):
        raise ValueError(
            f"{folder} is a checkpoint of this package ({own}): it needs no import, name it as runs/x@step-N."
        )
    found = read_peft(settings, read_tensors(files[1]), config, str(folder), base)
    named = settings.get("base_model_name_or_path")
    if isinstance(found, Vector):
        refuse_misfit(found, config, str(folder), base)
        return _of_vector(found, "peft", files, named)
    return ForeignAdapter("lightning_em.adapters.LoRA", found.init_args, found.tensors, "peft", files, named)


def _refuse_other_place(vector: Vector, config: PreTrainedConfig, file: Path) -> None:
    try:
        stream_site(config, vector.layer)
    except ValueError as error:
        raise ValueError(
            f"{file} was made to be added to the output of mlp.down_proj, and on this base that is not what "
            f"lightning_em.adapters.SteeringVector does: {error}"
        ) from error


def _of_vector(
    vector: Vector, kind: str, files: tuple[Path, ...], base_named: str | None = None
) -> ForeignAdapter:
    init_args = {"layer": vector.layer, "alpha": vector.alpha}
    path = "lightning_em.adapters.SteeringVector"
    return ForeignAdapter(path, init_args, {"vector": vector.values}, kind, files, base_named)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


def _step_of(folder: Path, step: int | None, before: list[int]) -> int:
    if step is not None:
        if step < 0 or any(step <= other for other in before):
            raise ValueError(f"--step {step} is the final adapter's: it must come after {sorted(before)}.")
        return step
    match = _CHECKPOINT.fullmatch(folder.resolve().name)
    if match and not before:
        return int(match[1])
    return max(before) + 1 if before else 0
