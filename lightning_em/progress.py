"""Progress of a fit as log lines, where no progress bar is visible."""

import logging
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


class LogProgress(Callback):
    """Log the batches done, the losses of the progress bar and the time left, unless standard error is a terminal.

    A progress bar redraws one line, which is unreadable in a file or a pipe.
    """

    def __init__(self) -> None:
        self._started = self._last = 0.0
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and note the first batch: a resumed run does not start at batch 0."""
        self._started = self._last = time.monotonic()
        self._first = trainer.fit_loop.total_batch_idx + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a line if `_SECONDS_BETWEEN_LINES` have passed since the last one."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES or not trainer.is_global_zero or sys.stderr.isatty():
            return
        self._last = now
        done = trainer.fit_loop.total_batch_idx + 1
        total = _num_batches(trainer)
        left = (
            ""
            if total is None
            else f", {(now - self._started) / (done - self._first) * (total - done):.0f} s left"
        )
        losses = "".join(f", {name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items())
        logger.info("batch %d of %s%s%s", done, total or "?", losses, left)


def _num_batches(trainer: Trainer) -> int | None:
    """Number of batches of the whole fit; None if neither the data nor the trainer sets it."""
    bounds = []
    if (
        trainer.max_epochs is not None
        and trainer.max_epochs > 0
        and trainer.num_training_batches != float("inf")
    ):
        bounds.append(int(trainer.num_training_batches) * trainer.max_epochs)
    if trainer.max_steps > 0:
        bounds.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(bounds, default=None)
