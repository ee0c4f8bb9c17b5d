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
from dataclasses import asdict

import torch
import yaml
from torch import distributed

from lightning_em import imports, lock, miniature
from lightning_em.analysis.cells import StudyFolder, start_difference
from lightning_em.cli import run_cli
from lightning_em.identity import changed_keys, identity_of
from lightning_em.lock import LockedError
from lightning_em.rebuild import resolved_config
from lightning_em.runs import RunFolder
from lightning_em.study.fingerprint import plan_of
from lightning_em.study.pairs import analyse_pairs
from lightning_em.study.states import data_difference

# Who held the run is gone or going: a worker of a killed study ends with it, but not in the same instant.
PATIENCE_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def fit(words: list[str]) -> None:
    """Fit one run, or continue it, exactly as `lightning-em` with these words does; note what was planned.

    Raises:
        ValueError: If its folder holds another run.
        RuntimeError: If the run ended without being finished.
    """
    _wait_for(words)
    plan = plan_of(words[1:])
    with leaving_no_trace():
        refuse_other_run(words)
        run = run_cli(words).run
    if (status := run.status()) != "finished":
        raise RuntimeError(f"the run ended as {status!r}; see {run.run_file}")
    run.update_run(plan=asdict(plan))


def refuse_other_run(words: list[str]) -> None:
    """See to it that the folder that words name is free, or holds what they mean, begun as it would begin now.

    `fit` itself compares configs alone: to it a finished run is the same run whatever became of its data.

    Raises:
        ValueError: What differs, and what to do.
    """
    folder = lock.named_folder(words)
    if folder is None or (known := RunFolder(folder).read_run().get("identity")) is None:
        return
    run, config = RunFolder(folder), resolved_config(imports.take(words)[1:])
    why = None
    if known != identity_of(config):
        changed = changed_keys(yaml.safe_load(run.config_file.read_text(encoding="utf-8")), config)
        why = f"another config: {', '.join(changed)}" if changed else "another recipe of its miniature world"
    elif run.steps():
        start = config["model"].get("init_from")
        why = data_difference(run) or (start_difference(run, RunFolder(start)) if start else None)
    if why:
        raise ValueError(
            f"{folder} holds another run ({why}). Remove that folder to run this one there, or keep it and give the "
            "study another --root."
        )


def build_world(address: str) -> None:
    """Unpack a shipped miniature world unless that has been done."""
    with leaving_no_trace():
        recipe, seed, _ = miniature.parse_address(address)
        miniature.provide(recipe, seed)


def compare(root: str, adapter: str, world: str, seed: int) -> None:
    """Measure the runs of a group against each other."""
    with leaving_no_trace():
        analyse_pairs(StudyFolder(root), adapter, world, seed)


def tidy() -> None:
    """Let go of what a task has left behind, also one that failed: memory, and its ties to other ranks."""
    if distributed.is_initialized():
        distributed.destroy_process_group()  # the next run has ranks of its own
    gc.collect()  # the trainer and its module refer to each other, and the module holds the base model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_is_lost() -> bool:
    """Whether this process can do nothing more on its GPU, as after an illegal access: then a new one has to."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
