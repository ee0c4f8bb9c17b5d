"""Progress of a fit in optimizer steps: a bar on a terminal, log lines elsewhere."""

import contextlib
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import progress as rich_progress
from rich.console import Console

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0
_FIRST_LINE = 3  # steps until the first line: the first step alone is slower than the rest
_RECENT_STEPS = 50


class Progress(Callback):
    """Show the optimizer steps taken, the metrics of the progress bar and the time left.

    On a terminal and in a notebook this is a bar. Elsewhere, where a bar would fill a log, it is a line after the third
    step and then every 15 seconds. A metric that is NaN was not computed and is shown as a dash.

    The time left is the median duration of recent steps, plus the time spent on checkpoints, probes and validation so
    far, per step, times the number of steps left.

    Args:
        bar: Whether to draw a bar; False logs lines everywhere.
    """

    def __init__(self, bar: bool = True) -> None:
        self._wants_bar = bar
        self._shown = contextlib.ExitStack()
        self._bar: rich_progress.Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock at the current step: a resumed run does not start at step 0."""
        self._first = self._step = _steps_taken(trainer)
        self._stepped = self._told = time.monotonic()
        self._durations: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._pauses, self._is_paused = 0.0, False
        self._total = _total_steps(trainer)
        # a bar in the trainer's callbacks takes the place of this one
        if (
            self._wants_bar
            and trainer.is_global_zero
            and trainer.progress_bar_callback is None
            and _has_screen()
        ):
            self._bar = self._shown.enter_context(_bar())
            self._task = self._bar.add_task(self._position(), total=self._total, metrics="", state="")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that the model is evaluated."""
        self._pause("validation")

    def on_checkpoint_published(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Show that probes run; `AdapterCheckpoint` calls this."""
        self._pause("probes")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, update the bar, or log a line if one is due."""
        step, now = _steps_taken(trainer), time.monotonic()
        if step == self._step:
            return  # gradient accumulation: no optimizer step was taken
        duration = now - self._stepped
        if self._is_paused and self._durations:
            usual = statistics.median(self._durations)
            self._pauses += max(0.0, duration - usual)
            duration = min(duration, usual)
        self._durations.append(duration)
        self._step, self._stepped, self._is_paused = step, now, False
        metrics, left = _metrics(trainer), self._time_left()
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, description=self._position(), metrics=metrics, state=left
            )
            return
        is_due = step - self._first == _FIRST_LINE or now - self._told >= _SECONDS_BETWEEN_LINES
        if is_due and trainer.is_global_zero and (trainer.progress_bar_callback is None or not _has_screen()):
            self._told = now
            logger.info("%s: %s", self._position(), ", ".join(filter(None, [metrics, left])))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the bar."""
        self._shown.close()
        self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar before the error is reported."""
        self.on_fit_end(trainer, pl_module)

    def _pause(self, state: str) -> None:
        self._is_paused = True
        if self._bar is not None:
            self._bar.update(self._task, state=state)

    def _position(self) -> str:
        return f"step {self._step}" + ("" if self._total is None else f"/{self._total}")

    def _time_left(self) -> str:
        if self._total is None or self._total <= self._step:
            return ""
        per_step = statistics.median(self._durations) + self._pauses / (self._step - self._first)
        return f"{duration_text(per_step * (self._total - self._step))} left"


def duration_text(seconds: float) -> str:
    """Write a duration in the unit that suits it.

    >>> [duration_text(seconds) for seconds in (9.6, 600, 36_000)]
    ['10 s', '10 min', '10 h 0 min']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _steps_taken(trainer: Trainer) -> int:
    # with manual optimization, Lightning counts the steps of all optimizers together
    return trainer.global_step // max(1, len(trainer.optimizers))


def _total_steps(trainer: Trainer) -> int | None:
    """Number of optimizer steps of the whole fit; None if neither the data nor the trainer sets it."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 < total < math.inf else None


def _metrics(trainer: Trainer) -> str:
    return ", ".join(
        f"{name} {'-' if math.isnan(value) else f'{value:,.0f}' if value >= 1000 else f'{value:.3g}'}"
        for name, value in trainer.progress_bar_metrics.items()
    )


def _has_screen() -> bool:
    """Whether a bar can be redrawn in place."""
    console = Console(stderr=True)
    return console.is_jupyter or (sys.stderr.isatty() and not console.is_dumb_terminal)


@contextlib.contextmanager
def _bar() -> Iterator[rich_progress.Progress]:
    """Draw a bar at the bottom of the terminal, with log messages above it."""
    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=10),
        rich_progress.TextColumn("{task.fields[metrics]}", markup=False),
        rich_progress.TextColumn("{task.fields[state]}", style="progress.remaining", markup=False),
    )
    before = sys.stderr
    bar = rich_progress.Progress(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=2,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar, contextlib.ExitStack() as moved:
        # While a bar is shown, rich replaces sys.stderr. Log handlers hold the former one and would write into the bar.
        for handler in _stream_handlers():
            if handler.stream is before:
                handler.setStream(sys.stderr)
                moved.callback(handler.setStream, before)
        yield bar


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    for each in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(each, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
