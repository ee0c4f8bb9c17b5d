"""Metrics file of a run: append-only, with each step and name exactly once."""

import logging
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_em.manifest import write_atomically
from lightning_em.records import append_lines, read_lines

logger = logging.getLogger(__name__)

HEADER = "step,name,value"

_SECONDS_BETWEEN_WRITES = 5.0


class MetricsFile(Logger):
    """Append every metric to a long-form CSV: step, name, value.

    Values reach the file every five seconds and before each checkpoint, so that a long run can be watched. A resumed
    run first drops the rows after its checkpoint, so that no step occurs twice.

    Args:
        path: CSV file, created with the first value.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[str] = []
        self._written = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the run, taken from its folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: a run has one version, its folder."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Buffer the values, and write them if the last write is five seconds ago.

        A failed write is only a warning here, since the values stay in the buffer; before a checkpoint it is an error.
        """
        if step is None:
            return
        self._rows += [f"{step},{name},{float(value)!r}" for name, value in metrics.items()]
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            try:
                self.save()
            except OSError as error:
                self._written = math.inf  # until `save` succeeds
                logger.warning("%s cannot be written before the next checkpoint: %s", self.path, error)

    @rank_zero_only
    def save(self) -> None:
        """Append the buffered values with one write and one fsync; `AdapterCheckpoint` calls it before it publishes."""
        if self._rows:
            # a process that is killed in its first write leaves an empty file, once the incomplete line is removed
            has_header = self.path.exists() and self.path.stat().st_size > 0
            header = [] if has_header else [HEADER]
            append_lines(self.path, *header, *self._rows)
            self._rows = []
        self._written = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining values; after a failed run, which may have run out of disk space, only warn on errors."""
        try:
            self.save()
        except OSError as error:
            if status != "failed":
                raise
            logger.warning("the last metrics are lost: %s", error)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the resolved config is saved in the same folder."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop everything after `step`, because the run is about to repeat those steps."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in read_lines(self.path)
            if line.startswith("step") or int(line.split(",", 1)[0]) <= step
        ]
        write_atomically(self.path, "".join(f"{line.rstrip()}\n" for line in kept))
