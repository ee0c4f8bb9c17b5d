"""Write checkpoints on schedule and notify other callbacks once one is on disk."""

import errno
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_em.runs import RunFolder


@runtime_checkable
class CheckpointListener(Protocol):
    """A callback that is notified after a checkpoint has been published."""

    def on_checkpoint_published(self, trainer: Trainer, module: Any, step: int) -> None:
        """Called on every rank after the checkpoint of `step` is complete on disk."""


class DiskNeed(NamedTuple):
    """Disk space of the checkpoints that are still to be written.

    Attributes:
        checkpoints: Number of checkpoints on disk at the same time.
        bytes_each: Estimated size of one checkpoint.
        free: Free space in bytes.
    """

    checkpoints: int
    bytes_each: int
    free: int


def before_validation(trainer: Trainer) -> bool:
    """Whether the validation of an epoch, or of the whole fit, follows the step that was just taken."""
    return trainer.is_last_batch or trainer.global_step >= trainer.estimated_stepping_batches


class AdapterCheckpoint(Checkpoint):
    """Write an adapter-only checkpoint every `every_n_steps` optimizer steps and at the end of training.

    Args:
        every_n_steps: Steps between checkpoints; 0 writes only the last one.
        dense_until: Last step of the early phase, in which checkpoints are also written every `dense_every` steps.
        dense_every: Steps between checkpoints of the early phase.
        keep_last: Number of newest checkpoints to keep; all by default.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        dense_until: int = 0,
        dense_every: int = 5,
        keep_last: int | None = None,
    ) -> None:
        if (
            every_n_steps < 0
            or dense_until < 0
            or dense_every < 1
            or (keep_last is not None and keep_last < 1)
        ):
            raise ValueError(
                "checkpoint needs every_n_steps >= 0, dense_until >= 0, dense_every >= 1 and keep_last >= 1, got "
                f"{every_n_steps}, {dense_until}, {dense_every}, {keep_last}; change the keys under checkpoint."
            )
        self.every_n_steps, self.keep_last = every_n_steps, keep_last
        self.dense_until, self.dense_every = dense_until, dense_every
        self._last_published = -1

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is written after this many optimizer steps."""
        regular = self.every_n_steps > 0 and step % self.every_n_steps == 0
        return step > 0 and (regular or (step <= self.dense_until and step % self.dense_every == 0))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the checkpoint that a resumed run started from, and check the disk space for the remaining ones.

        Raises:
            OSError: If the disk has less free space than the remaining checkpoints need.
        """
        self._last_published = trainer.global_step
        refusal = self._no_room(trainer, pl_module) if trainer.is_global_zero else None
        if refusal := trainer.strategy.broadcast(refusal):
            raise OSError(errno.ENOSPC, refusal)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark that no training has happened yet."""
        self._last_published = -1

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notify the listeners if a resumed run had no step left, so that training hooks were never called.

        This happens if a run was killed after its last checkpoint and before its end.
        """
        if self._last_published < 0 and trainer.global_step > 0:
            pl_module.to(trainer.strategy.root_device)  # the strategy's teardown has moved it to the CPU
            self._tell(trainer, pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step; a step that is validated is saved after that, in `on_train_epoch_end`."""
        if not before_validation(trainer):
            self._publish_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch's validation, so that a resumed run has its metrics."""
        self._publish_if_due(trainer, pl_module)

    def _publish_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._last_published and self.due(trainer.global_step):
            self.publish(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, unless it has already been saved."""
        if trainer.global_step != self._last_published:
            self.publish(trainer, pl_module)

    def publish(self, trainer: Trainer, pl_module: LightningModule, tell: bool = True) -> Path:
        """Write the checkpoint on rank zero, wait on every rank, then notify the listeners.

        Args:
            trainer: Trainer that is fitting.
            pl_module: Module of the trainer.
            tell: Whether to notify listeners (probes); False for an emergency save.
        """
        run, step = RunFolder(trainer.default_root_dir), trainer.global_step
        for log in trainer.loggers:
            log.save()  # metrics first: a checkpoint's step must be in the metrics file, see MetricsFile.rewind
        trainer.save_checkpoint(run.checkpoint(step), weights_only=False)
        self._last_published = step
        if trainer.is_global_zero:
            self._retire(trainer, run)
        if tell:
            self._tell(trainer, pl_module, step)
        return run.checkpoint(step)

    def _tell(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CheckpointListener):
                callback.on_checkpoint_published(trainer, pl_module, step)

    def disk_need(self, trainer: Trainer, pl_module: LightningModule) -> DiskNeed | None:
        """Estimate the disk space of the checkpoints that are still to be written; None for a fit without end."""
        run, last = RunFolder(trainer.default_root_dir), trainer.estimated_stepping_batches
        if not math.isfinite(last):
            return None
        steps = [
            step for step in range(trainer.global_step + 1, int(last) + 1) if self.due(step) or step == last
        ]
        kept = len(steps) if self.keep_last is None else min(len(steps), self.keep_last + 1)
        written = [run.checkpoint(step) for step in run.steps()]
        sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in written]
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        # Adam keeps two moments per weight; the remainder is random states and the manifest
        each = max([3 * weights + 40_000, *sizes])
        return DiskNeed(kept, each, shutil.disk_usage(run.path).free)

    def _no_room(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Return an error message if the remaining checkpoints need more space than there is."""
        need = self.disk_need(trainer, pl_module)
        if need is None or need.checkpoints * need.bytes_each <= need.free:
            return None
        return (
            f"the remaining {need.checkpoints} checkpoints need about {need.checkpoints * need.bytes_each:,} bytes, "
            f"but {RunFolder(trainer.default_root_dir).path} has {need.free:,} free. Free some "
            "space, choose another --run.root, or write fewer with checkpoint.every_n_steps or checkpoint.keep_last."
        )

    def _retire(self, trainer: Trainer, run: RunFolder) -> None:
        if self.keep_last is None:
            return
        for step in run.steps()[: -self.keep_last]:
            trainer.strategy.checkpoint_io.remove_checkpoint(run.checkpoint(step))
