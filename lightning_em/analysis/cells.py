"""The cells of a study: which run plays which role, and where its folder is. Never imports torch."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning_em.manifest import write_atomically
from lightning_em.runs import RunFolder

STUDY_SCHEMA = 1
DEFAULT_WORLD = "default"
MOST_SEEDS = 16
"""That the exact test of a claim takes."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        run: Its folder below the study's root.
        arm: Name of the arm in the study's file.
        role: What the arm is for, e.g. `general`, `narrow`, `reverted`; claims are made of roles.
        level: The arm's number (a KL weight in nats, a share, a number of rows); None where it has none.
        adapter: Adapter type, e.g. `rank32`.
        world: `default`, `control`.
        seed: Training seed, the unit of inference.
        init_from: Run it starts from; None for a fresh adapter.
    """

    run: str
    arm: str
    role: str
    level: float | None
    adapter: str
    world: str
    seed: int
    init_from: str | None = None


class StudyFolder:
    """Root of a study: `study.json`, and a run folder for each of its cells.

    Args:
        root: The folder; it need not exist before the cells are written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.file = self.root / "study.json"
        self.measurements_file = self.root / "measurements.csv"
        self.pair_folder = self.root / "pairs"

    @property
    def name(self) -> str:
        """Name of the study."""
        return str(self._read()["name"])

    def cells(self) -> list[Cell]:
        """All cells, in the order of the study.

        Raises:
            ValueError: If there is no study here, or another version's.
        """
        known, content = {field.name for field in fields(Cell)}, self._read()
        try:
            return [
                Cell(**{key: value for key, value in cell.items() if key in known})
                for cell in content["cells"]
            ]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def run(self, cell: Cell) -> RunFolder:
        """The run folder of a cell; it need not exist."""
        return RunFolder(self.root / cell.run)

    def finished(self) -> list[Cell]:
        """The cells whose run says that it is finished."""
        return [cell for cell in self.cells() if self.run(cell).read_run().get("status") == "finished"]

    def write(self, name: str, cells: Iterable[Cell]) -> None:
        """Write `study.json` in one step.

        Raises:
            ValueError: If two cells have one run folder, or a cell starts from a run that is not in the study.
        """
        cells = list(cells)
        runs = [cell.run for cell in cells]
        if twice := sorted({run for run in runs if runs.count(run) > 1}):
            raise ValueError(f"each cell needs a run folder of its own; used more than once: {twice}.")
        if lost := sorted({cell.init_from for cell in cells if cell.init_from} - set(runs)):
            raise ValueError(f"cells start from runs {lost} that are no cells of the study.")
        content = {"schema": STUDY_SCHEMA, "name": name, "cells": [asdict(cell) for cell in cells]}
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(content, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        if not self.file.is_file():
            raise ValueError(
                f"there is no study at {self.root} (no {self.file.name}); "
                "write one with `lightning-em study expand` or `study run`."
            )
        try:
            content: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(error) from None
        if not isinstance(content, dict):
            raise self._damaged(f"a {type(content).__name__} instead of an object")
        if content.get("schema") != STUDY_SCHEMA:
            raise ValueError(
                f"{self.file} has schema {content.get('schema')}, expected {STUDY_SCHEMA}: "
                "write it again with `lightning-em study expand`."
            )
        return content

    def _damaged(self, found: object) -> ValueError:
        return ValueError(
            f"{self.file} is damaged ({found!r}): write it again with `lightning-em study expand`."
        )
