"""Records of what was measured between runs of one base: the pair analyses of a study. Never imports torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_em.analysis.cells import StudyFolder
from lightning_em.records import Point, append_lines, parsed_lines

SOLUTIONS = ("general", "narrow")
ROLES = (*SOLUTIONS, "reverted", "reverse")
"""Runs that are compared with each other, by role; there is no comparison without both solutions."""


@dataclass(frozen=True)
class PairResult:
    """Everything one analysis found between runs of one adapter, world and seed.

    Attributes:
        analysis: Its name.
        adapter: Of the study's adapters.
        world: Of the study's worlds.
        seed: Training seed.
        runs: Run folder of each role.
        steps: Optimiser steps behind each role's newest checkpoint.
        settings: Of the analysis: other settings are another measurement.
        points: The measurements.
        examples: Row ids that `per_example` values refer to.
        adapter_sha256: Hash of the weights in each role's newest checkpoint; empty in records older than it.
    """

    analysis: str
    adapter: str
    world: str
    seed: int
    runs: Mapping[str, str]
    steps: Mapping[str, int]
    settings: Mapping[str, Any]
    points: tuple[Point, ...]
    examples: tuple[str, ...] = ()
    adapter_sha256: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: str) -> "PairResult":
        """Read back one line."""
        fields = json.loads(line)
        fields["points"] = tuple(map(Point.from_fields, fields["points"]))
        fields["examples"] = tuple(fields["examples"])
        return cls(**fields)

    def to_json(self) -> str:
        """One line, NaN refused.

        Raises:
            ValueError: If a value is NaN or infinite.
        """
        return json.dumps(asdict(self), allow_nan=False)

    def measures_the_same_as(self, other: "PairResult") -> bool:
        """Whether both are the same analysis of the same checkpoints with the same settings."""
        keys = ["analysis", "adapter", "world", "seed", "runs", "steps", "settings"]
        keys += ["adapter_sha256"] if self.adapter_sha256 and other.adapter_sha256 else []
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def append_to(self, study: StudyFolder) -> None:
        """Add this line to its file."""
        append_lines(pair_file(study, self.analysis, self.adapter, self.world, self.seed), self.to_json())


def pair_file(study: StudyFolder, analysis: str, adapter: str, world: str, seed: int) -> Path:
    """Where an analysis of one adapter, world and seed is: a file of its own, as workers write side by side."""
    return study.pair_folder / analysis / f"{adapter}-{world}-seed{seed}.jsonl"


def read_pair_file(file: Path) -> list[PairResult]:
    """All results in one file, in the order they were written.

    Raises:
        ValueError: If a line is damaged.
    """
    return list(parsed_lines(file, PairResult.from_json))


def read_pairs(study: StudyFolder, analysis: str) -> list[PairResult]:
    """The newest result of an analysis for each adapter, world and seed that has one."""
    files = sorted((study.pair_folder / analysis).glob("*.jsonl"))
    return [results[-1] for file in files if (results := read_pair_file(file))]
