"""Fits to submit, and their arrangement in job arrays. Never imports torch."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FitJob:
    """One `lightning-em fit` command.

    Attributes:
        args: Command-line arguments after `fit`.
        folder: Run folder that follows from the arguments.
        starts_from: Run folder whose run must be finished before this one starts.
    """

    args: tuple[str, ...]
    folder: Path
    starts_from: Path | None = None


@dataclass
class JobArray:
    """Fits of one batch file, by array index; each waits for the fit of the same index in `after`."""

    jobs: dict[int, FitJob] = field(default_factory=dict)
    after: "JobArray | None" = None


def arrays_of(jobs: Iterable[FitJob]) -> list[JobArray]:
    """Arrange fits in as few arrays as their dependencies allow, ordered so that an array follows those it depends on.

    A fit has the same index as the fit it starts from, so that it waits only for that one (Slurm's `aftercorr`).
    A second fit with the same starting point goes into another array.

    Args:
        jobs: Fits in dependency order. A starting point that is not among them must exist already.
    """
    first = JobArray()
    arrays: dict[tuple[int, int], JobArray] = {}
    places: dict[Path, tuple[JobArray, int]] = {}
    children: Counter[Path] = Counter()
    for job in jobs:
        if job.starts_from is None or job.starts_from not in places:
            array, index = first, len(first.jobs)
        else:
            parent, index = places[job.starts_from]
            array = arrays.setdefault((id(parent), children[job.starts_from]), JobArray(after=parent))
            children[job.starts_from] += 1
        array.jobs[index] = job
        places[job.folder] = array, index
    return [array for array in (first, *arrays.values()) if array.jobs]


def shared_beginning(sequences: Sequence[Sequence[str]]) -> int:
    """Return the length of the common prefix of several sequences."""
    columns = enumerate(zip(*sequences, strict=False))
    different = (index for index, column in columns if len(set(column)) > 1)
    return next(different, min(len(sequence) for sequence in sequences))


def variations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the flags of every combination of sweeps written `key=value,value`; without sweeps, one empty tuple.

    Raises:
        ValueError: If a sweep does not have this form.
    """
    axes = []
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        values = [value.strip() for value in _split(text)]
        if not key or "" in values or key.startswith("-"):
            raise ValueError(
                f"--sweep expects key=value,value as in --sweep model.objective.kl_weight=0,1,10, got {sweep!r}."
            )
        axes.append([f"--{key}={value}" for value in values])
    return list(itertools.product(*axes))


def _split(text: str) -> list[str]:
    """Split at commas outside brackets: `{"a": [1, 2], "b": 3}` is one value."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
