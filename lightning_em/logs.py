"""Logging of a run: its console.log, and filters for third-party messages."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import transformers

EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # intended for the frozen base model
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r"`is_gradient_checkpointing` is deprecated",  # peft still reads the old attribute of transformers
    r".*`srun` command is available",
    r".*on epoch level in distributed setting",  # TokenMean has already reduced over the ranks
)
CHATTER = (
    "\U0001f4a1 Tip", "Seed set to", "TPU available", "GPU available: False", "Loading `train_dataloader` to estimate",
    "`Trainer.fit` stopped: `max_",  # the summary says so
    "You are using a CUDA device",  # matmul precision is chosen deliberately: float32 is the adapter's, or requested
)  # fmt: skip


@contextlib.contextmanager
def console_log(path: Path) -> Iterator[None]:
    """Also append log messages, with the time, to a file of the run."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    names = ("lightning_em", "lightning.pytorch")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        handler.close()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Show messages on standard error, as a command does; a caller's own logging is left alone."""
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)


def filter_expected_messages() -> None:
    """Filter out expected warnings and third-party messages."""
    transformers.utils.logging.disable_progress_bar()
    for text in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_no_chatter)


def _is_no_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CHATTER)
