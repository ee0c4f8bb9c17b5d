"""Tasks of a study's workers: a fit, or the pair analyses of a group."""

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

# The previous holder of the lock may still be exiting: the workers of a killed study end shortly after it.
PATIENCE_SECONDS = 10.0


def fit(args: list[str]) -> None:
    """Fit or continue one run, as `lightning-em fit` does with these arguments.

    Raises:
        ValueError: If the folder holds another run.
        RuntimeError: If the fit ended but the run is not finished.
    """
    experiment = Experiment(args)
    _wait_for(experiment.folder.path)
    experiment.fit()
    if (status := experiment.folder.status()) != "finished":
        raise RuntimeError(f"the run ended as {status!r}; see {experiment.folder.run_file}")


def compare(root: str, adapter: str, world: str, seed: int) -> None:
    """Run the pair analyses of one adapter, world and seed."""
    analyse_pairs(StudyFolder(root), adapter, world, seed)


def tidy() -> None:
    """Release the memory and the process group of the last task, whether it failed or not."""
    if distributed.is_initialized():
        distributed.destroy_process_group()  # the next run may have another number of ranks
    gc.collect()  # the trainer and the module refer to each other, so reference counting alone keeps the base model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_is_lost() -> bool:
    """Whether this process can no longer use its GPU and must be replaced.

    After some errors, such as an illegal memory access, every later CUDA call of the process fails.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


KINDS: Mapping[str, Callable[..., None]] = {"fit": fit, "compare": compare}
"""Functions that run a task, by the task's `kind`."""


def _wait_for(folder: Path) -> None:
    """Wait until the folder's lock is free or the patience is used up; `fit` raises if it is still held."""
    end = time.monotonic() + PATIENCE_SECONDS
    while lock.is_held(folder) and time.monotonic() < end:
        time.sleep(0.2)
