"""Checkpoint folders: adapter weights in a standard format, and the trainer's state next to them."""

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
    """Write and read checkpoint folders like `step-000040/`; a folder appears complete or not at all.

    Contents: `adapter_model.safetensors`, `adapter_config.json`, `trainer_state.pt` (optimizer, position,
    random states; loaded with `weights_only=True`) and `MANIFEST.json`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Publish a checkpoint folder at `path`; a valid folder that exists already is kept.

        Raises:
            ValueError: If the state holds objects that cannot be loaded with `weights_only=True`.
            OSError: If the disk is full or the folder cannot be written; the message names path and bytes.
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
                    f"the trainer's state holds {sorted(unsafe)}, which cannot be loaded safely on resume; a custom "
                    "callback, scheduler or optimizer must keep its state to tensors and plain values."
                )

        try:
            publish(Path(path), write)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch and safetensors raise their own error types for a full disk
            raise self._explained(error, Path(path), _num_bytes(checkpoint)) from error

    def _explained(self, error: Exception, path: Path, needed: int) -> Exception:
        """Explain a failed write with path and bytes; errors not caused by the disk are returned unchanged."""
        free = shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < needed:
            return OSError(
                errno.ENOSPC,
                f"could not write {path}: it needs about {needed:,} bytes, and the disk has {free:,} free. No partial "
                "checkpoint is left, and earlier checkpoints are complete; free some space and run the same command.",
            )
        if isinstance(error, OSError):
            return type(error)(error.errno, f"could not write {path} ({needed:,} bytes): {error.strerror}")
        return error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint folder, always with `weights_only=True`.

        Raises:
            ValueError: If files are missing or changed since they were written.
        """
        folder = Path(path)
        if problems := manifest_problems(folder):
            raise ValueError(f"checkpoint {folder} is corrupt: {'; '.join(problems)}")
        try:
            state: dict[str, Any] = torch.load(folder / TRAINER_STATE, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{folder / TRAINER_STATE} holds something other than tensors and plain values, which this package "
                "never writes; it was not loaded, because loading it could run code."
            ) from error
        state["state_dict"] = load_file(folder / ADAPTER_WEIGHTS)
        state[ADAPTER_CONFIG_KEY] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder; rename it first, so that a kill never leaves a partial folder under its name."""
        doomed = Path(path).with_name(f"{TEMPORARY_PREFIX}{Path(path).name}-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(Path(path).rename(doomed))


def _num_bytes(state: Any) -> int:
    """Bytes of all tensors in nested state, plus an estimate for the containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() + 512
    if isinstance(state, dict):
        return 64 + sum(_num_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return 8 * len(state) + sum(_num_bytes(value) for value in state)
    return 64
