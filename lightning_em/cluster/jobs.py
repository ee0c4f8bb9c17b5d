"""Fits that are to be queued, and how they fall into job arrays. Never imports torch."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FitJob:
    """One `lightning-em fit`.

    Attributes:
        args: Command-line arguments after `fit`.
        folder: The run folder that follows from them.
        starts_from: Run folder that must be finished before it starts.
    """

    args: tuple[str, ...]
    folder: Path
    starts_from: Path | None = None


@dataclass
class JobArray:
    """Fits that one batch file holds, by index; a fit waits for the one of the same index in `after`."""

    jobs: dict[int, FitJob] = field(default_factory=dict)
    after: "JobArray | None" = None


def arrays_of(jobs: Iterable[FitJob]) -> list[JobArray]:
    """Arrange fits in as few arrays as their starting points allow, each behind the one it depends on.

    A fit has the index of the fit it starts from, so that it waits for that one alone; the second fit from
    the same starting point belongs to another array.

    Args:
        jobs: A fit comes after the one it starts from; a starting point that is not among them is there already.
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
    """How many items several sequences begin with alike."""
    columns = enumerate(zip(*sequences, strict=False))
    different = (index for index, column in columns if len(set(column)) > 1)
    return next(different, min(len(sequence) for sequence in sequences))


def variations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Flags of every combination of sweeps written `key=value,value`; one without flags if there is no sweep.

    Raises:
        ValueError: If a sweep is not written like that.
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
    """The parts between commas that are in no bracket: `{"a": [1, 2], "b": 3}` is one value."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
