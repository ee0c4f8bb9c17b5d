"""A checkpoint is a folder: adapter weights anyone can load, and the trainer's state beside them."""

import errno
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lightning_em.manifest import TEMPORARY_PREFIX, manifest_problems, publish

TRAINER_STATE = "trainer_state.pt"
ADAPTER_CONFIG_KEY = "adapter_config"


class FolderCheckpointIO(CheckpointIO):
    """Write and read folders like `step-000040/`; they appear whole or not at all.

    Inside: `adapter_model.safetensors`, `adapter_config.json`, `trainer_state.pt` (optimiser, position,
    random states; loaded weights-only) and `MANIFEST.json`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Publish a checkpoint folder at `path`; a valid one that is there already is kept.

        Raises:
            ValueError: If the state holds objects that could not be loaded weights-only.
            OSError: If the disk is full or the folder cannot be written; names path and bytes.
        """
        state = dict(checkpoint)
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.pop("state_dict").items()}
        config = state.pop(ADAPTER_CONFIG_KEY)

        def write(folder: Path) -> None:
            save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
            torch.save(state, folder / TRAINER_STATE)
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(folder / TRAINER_STATE):
                raise ValueError(
                    f"the trainer's state holds {sorted(unsafe)}, which cannot be loaded safely on resume; a "
                    "callback, scheduler or optimiser of yours must keep its state to tensors and plain values."
                )

        try:
            publish(Path(path), write)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors have words of their own
            raise self._explained(error, Path(path), _num_bytes(checkpoint)) from error

    def _explained(self, error: Exception, path: Path, needed: int) -> Exception:
        """What a failed write means, with path and bytes; an error that is not the disk's stays as it is."""
        free = shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < needed:
            return OSError(
                errno.ENOSPC,
                f"could not write {path}: it needs about {needed:,} bytes, and the disk has {free:,} free. Nothing "
                "half written is left, earlier checkpoints are whole; free some space and give the same command.",
            )
        if isinstance(error, OSError):
            return type(error)(error.errno, f"could not write {path} ({needed:,} bytes): {error.strerror}")
        return error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder back, always weights-only.

        Raises:
            ValueError: If files are missing or changed since they were written.
        """
        folder = Path(path)
        if problems := manifest_problems(folder):
            raise ValueError(f"checkpoint {folder} is broken: {'; '.join(problems)}")
        try:
            state: dict[str, Any] = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{folder / TRAINER_STATE} holds something other than tensors and plain values, which this package "
                "never writes; loading it could run code, so it was not."
            ) from error
        state["state_dict"] = load_file(folder / ADAPTER_WEIGHTS)
        state[ADAPTER_CONFIG_KEY] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder; under another name first, so that a kill leaves none half deleted."""
        doomed = Path(path).with_name(f"{TEMPORARY_PREFIX}{Path(path).name}-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(Path(path).rename(doomed))


def _num_bytes(state: Any) -> int:
    """Bytes of all tensors in nested state, and some for what is around them."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + 512
    if isinstance(state, dict):
        return 64 + sum(_num_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return 8 * len(state) + sum(_num_bytes(value) for value in state)
    return 64
