"""The tasks of a study's worker: a fit, the pair analyses of a group."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import distributed

from lightning_em import lock
from lightning_em.analysis.cells import StudyFolder
from lightning_em.experiment import Experiment
from lightning_em.study.pairs import analyse_pairs

# The previous lock holder may still be exiting: a worker of a killed study ends with it, but not at once.
PATIENCE_SECONDS = 10.0


def fit(args: list[str]) -> None:
    """Fit one run, or continue it, as `lightning-em fit` with these arguments does.

    Raises:
        ValueError: If its folder holds another run.
        RuntimeError: If the run ended without being finished.
    """
    experiment = Experiment(args)
    _wait_for(experiment.folder.path)
    experiment.fit()
    if (status := experiment.folder.status()) != "finished":
        raise RuntimeError(f"the run ended as {status!r}; see {experiment.folder.run_file}")


def compare(root: str, adapter: str, world: str, seed: int) -> None:
    """Measure the runs of a group against each other."""
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


KINDS: Mapping[str, Callable[..., None]] = {"fit": fit, "compare": compare}
"""What a task may be, by the `kind` it names."""


def _wait_for(folder: Path) -> None:
    """Wait for the last holder of the run's folder, which may still be exiting; `fit` refuses one that stays."""
    end = time.monotonic() + PATIENCE_SECONDS
    while lock.is_held(folder) and time.monotonic() < end:
        time.sleep(0.2)
