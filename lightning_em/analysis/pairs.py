"""Records of the pair analyses of a study: measurements between runs of one base model. Never imports torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_em.analysis.cells import StudyFolder
from lightning_em.records import SCHEMA_VERSION, Point, append_lines, parsed_lines

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
        adapter_sha256: Hash of the weights in each role's newest checkpoint.
    """

    analysis: str
    adapter: str
    world: str
    seed: int
    runs: Mapping[str, str]
    steps: Mapping[str, int]
    settings: Mapping[str, Any]
    adapter_sha256: Mapping[str, str]
    points: tuple[Point, ...] = ()
    examples: tuple[str, ...] = ()
    schema: int = SCHEMA_VERSION

    @classmethod
    def from_json(cls, line: str) -> "PairResult":
        """Parse one line of a pair file."""
        fields = {"schema": 1, "adapter_sha256": {}} | json.loads(line)
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
        return replace(self, points=(), examples=()) == replace(other, points=(), examples=())

    def append_to(self, study: StudyFolder) -> None:
        """Append this result to its pair file."""
        append_lines(pair_file(study, self.analysis, self.adapter, self.world, self.seed), self.to_json())


def pair_file(study: StudyFolder, analysis: str, adapter: str, world: str, seed: int) -> Path:
    """Return the path of an analysis of one adapter, world and seed; separate files let workers write in parallel."""
    return study.pair_folder / analysis / f"{adapter}-{world}-seed{seed}.jsonl"


def read_pair_file(file: Path) -> list[PairResult]:
    """Read all results in one file, in the order in which they were written, except those of an older schema.

    Raises:
        ValueError: If a line is damaged.
    """
    return [result for result in parsed_lines(file, PairResult.from_json) if result.schema == SCHEMA_VERSION]


def read_pairs(study: StudyFolder, analysis: str = "*") -> list[PairResult]:
    """Read the newest result of an analysis, or of every one, for each adapter, world and seed."""
    files = sorted(study.pair_folder.glob(f"{analysis}/*.jsonl"))
    return [results[-1] for file in files if (results := read_pair_file(file))]
