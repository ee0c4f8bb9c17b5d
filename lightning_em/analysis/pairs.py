"""Records of the pair analyses of a study: measurements between runs of one base model. Never imports torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_em.analysis.cells import StudyFolder
from lightning_em.records import Point, append_lines, parsed_lines

SOLUTIONS = ("general", "narrow")
ROLES = (*SOLUTIONS, "reverted", "reverse")
"""Roles of the runs in a pair analysis; `general` and `narrow` are required."""


@dataclass(frozen=True)
class PairResult:
    """Result of one analysis between runs of one adapter, world and seed.

    Attributes:
        analysis: Name of the analysis.
        adapter: Adapter type.
        world: Name of the world.
        seed: Training seed.
        runs: Run folder of each role.
        steps: Optimizer steps taken by each role's newest checkpoint.
        settings: Settings of the analysis; different settings make a different measurement.
        points: Measured values.
        examples: Row ids that `per_example` values refer to.
        adapter_sha256: Hash of the weights in each role's newest checkpoint; empty in records older than this
            field.
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
        """Parse one line of a pair file."""
        fields = json.loads(line)
        fields["points"] = tuple(map(Point.from_fields, fields["points"]))
        fields["examples"] = tuple(fields["examples"])
        return cls(**fields)

    def to_json(self) -> str:
        """Serialize to one line.

        Raises:
            ValueError: If a value is NaN or infinite.
        """
        return json.dumps(asdict(self), allow_nan=False)

    def measures_the_same_as(self, other: "PairResult") -> bool:
        """Whether both are the same analysis of the same checkpoints with the same settings."""
        keys = ["analysis", "adapter", "world", "seed", "runs", "steps", "settings"]
        # older records have no hash of the weights: compare it only if both have one
        keys += ["adapter_sha256"] if self.adapter_sha256 and other.adapter_sha256 else []
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def append_to(self, study: StudyFolder) -> None:
        """Append this result to its pair file."""
        append_lines(pair_file(study, self.analysis, self.adapter, self.world, self.seed), self.to_json())


def pair_file(study: StudyFolder, analysis: str, adapter: str, world: str, seed: int) -> Path:
    """Return the path of an analysis of one adapter, world and seed; separate files let workers write in parallel."""
    return study.pair_folder / analysis / f"{adapter}-{world}-seed{seed}.jsonl"


def read_pair_file(file: Path) -> list[PairResult]:
    """Read all results in one file, in the order in which they were written.

    Raises:
        ValueError: If a line is damaged.
    """
    return list(parsed_lines(file, PairResult.from_json))


def read_pairs(study: StudyFolder, analysis: str) -> list[PairResult]:
    """Read the newest result of an analysis for each adapter, world and seed."""
    files = sorted((study.pair_folder / analysis).glob("*.jsonl"))
    return [results[-1] for file in files if (results := read_pair_file(file))]
