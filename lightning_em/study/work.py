"""What a worker does for a study: a fit, a world, the pair analyses of a group; each leaves the process as it was."""

import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from lightning_em import lock, miniature
from lightning_em.analysis.cells import StudyFolder
from lightning_em.cli import run_cli
from lightning_em.lock import LockedError
from lightning_em.study.pairs import analyse_pairs
from lightning_em.study.states import files_sha256

# Who held the run is gone or going: a worker of a killed study ends with it, but not in the same instant.
PATIENCE_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def fit(words: list[str]) -> None:
    """Fit one run, or continue it, exactly as `lightning-em` with these words does; note what its files said.

    Raises:
        RuntimeError: If the run ended without being finished.
    """
    _wait_for(words)
    said = files_sha256(words)
    with leaving_no_trace():
        run = run_cli(words).run
    gc.collect()  # the trainer and its module refer to each other, and the module holds the base model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if (status := run.status()) != "finished":
        raise RuntimeError(f"the run ended as {status!r}; see {run.run_file}")
    run.update_run(files_sha256=said)


def build_world(address: str) -> None:
    """Build a miniature world unless it is there."""
    with leaving_no_trace():
        recipe, seed, _ = miniature.parse_address(address)
        miniature.build(recipe, seed, progress=False)


def compare(root: str, adapter: str, world: str, seed: int) -> None:
    """Measure the runs of a group against each other."""
    with leaving_no_trace():
        analyse_pairs(StudyFolder(root), adapter, world, seed)
    gc.collect()


KINDS: Mapping[str, Callable[..., None]] = {"fit": fit, "build_world": build_world, "compare": compare}
"""What a task may be, by the `kind` it names."""


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Put back what a command may change in its process: its words, environment, handlers, filters and logging."""
    words, environment, filters = sys.argv, dict(os.environ), warnings.filters[:]
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    root = logging.getLogger()
    logging_before, level = root.handlers[:], root.level
    try:
        yield
    finally:
        sys.argv = words
        os.environ.clear()
        os.environ.update(environment)
        warnings.filters[:] = filters  # type: ignore[index]
        root.handlers[:] = logging_before
        root.setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait_for(words: list[str]) -> None:
    """Let a dying holder of the run's folder go first; a live one is refused by the command itself."""
    folder, end = lock.named_folder(words), time.monotonic() + PATIENCE_SECONDS
    while folder is not None and time.monotonic() < end:
        try:
            return lock.refuse_if_held(folder)
        except LockedError:
            time.sleep(0.2)
    return None
