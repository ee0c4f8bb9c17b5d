"""The cells of a study: the role, the run folder and the numbers of each run. Never imports torch."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lightning_em.manifest import write_atomically
from lightning_em.records import Point
from lightning_em.runs import RunFolder, start_of

STUDY_SCHEMA = 2
DEFAULT_WORLD = "default"
MOST_SEEDS = 16
"""Maximum number of seeds for the exact test of a claim, which enumerates all 2^n sign flips."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        run: Run folder, relative to the study's root.
        arm: Name of the arm in the study file.
        role: Role of the arm, e.g. `general`, `narrow` or `reverted`; claims are stated in terms of roles.
        level: Number that distinguishes arms of one role (a KL weight, a share, a number of rows), if any.
        adapter: Adapter type, e.g. `rank32`.
        world: Name of the world, e.g. `default` or `control`.
        seed: Training seed, the unit of inference.
        init_from: Run to start from; None for a fresh adapter.
        planned_from: Hash of the options and files that define the run; None if any run in the folder is valid.
        identity: Identity of the expected run, without data and start; None until its config is resolved.
    """

    run: str
    arm: str
    role: str
    level: float | None
    adapter: str
    world: str
    seed: int
    init_from: str | None = None
    planned_from: str | None = None
    identity: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def from_fields(cls, content: Mapping[str, Any]) -> "Cell":
        """Build a cell from its JSON fields; unknown keys, e.g. of later versions, are ignored."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})


class Reading(NamedTuple):
    """One number in the measurements of a study.

    Attributes:
        cell: Cell of the run; a cell with the role `pair` if the number is computed from several runs.
        source: Origin of the number: the name of a probe or of a pair analysis, `checkpoint` if the checkpoint alone
            determines it, or `metrics`.
        step: Step of the checkpoint; 0 for numbers of whole runs.
        point: Quantity, unit, coordinates and value.
        protocol: Numbers of two runs are comparable only if their protocols are equal. See `ProbeResult.protocol`.
            Empty if the checkpoints alone determine the number.
    """

    cell: Cell
    source: str
    step: int
    point: Point
    protocol: str = ""


class StudyFolder:
    """Root folder of a study: `study.json` and one run folder per cell.

    Args:
        root: Path of the folder; it need not exist before `write`.
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
        """Return all cells, in the order of the study.

        Raises:
            ValueError: If the folder holds no study, or `study.json` is damaged or has another schema.
        """
        content = self._read()
        try:
            return [Cell.from_fields(cell) for cell in content["cells"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def run(self, cell: Cell) -> RunFolder:
        """Return the run folder of a cell; it need not exist."""
        return RunFolder(self.root / cell.run)

    def identities(self) -> dict[str, tuple[str | None, Mapping[str, Any] | None]]:
        """Return `planned_from` and `identity` of each cell by run folder; empty if no study can be read."""
        try:
            return {cell.run: (cell.planned_from, cell.identity) for cell in self.cells()}
        except ValueError:
            return {}

    def finished(self) -> list[Cell]:
        """Return the cells whose run is finished and matches the cell."""
        left_out = self.left_out()
        return [cell for cell in self.cells() if self._is_finished(cell) and cell.run not in left_out]

    def left_out(self) -> dict[str, str]:
        """Return the finished runs that do not match their cells, with the reason, by run folder."""
        cells = self.cells()
        differing = self.differences(cells)
        return {
            cell.run: differing[cell.run]
            for cell in cells
            if cell.run in differing and self._is_finished(cell)
        }

    def differences(self, cells: Iterable[Cell]) -> dict[str, str]:
        """Return the existing runs that do not match their cells, with the reason, by run folder.

        A run also differs if the run it starts from is unfinished or differs itself.

        Args:
            cells: Cells to check, including the cells they start from.
        """
        known = {cell.run: cell for cell in cells}

        @cache
        def reason(name: str) -> str | None:
            cell = known[name]
            parent = known[cell.init_from] if cell.init_from else None
            if found := self._difference(cell, parent):
                return found
            if parent and self._is_finished(cell) and not self._is_finished(parent):
                return f"the run it starts from, {parent.run}, is not finished"
            if parent and reason(parent.run):
                return f"it starts from {parent.run}, which is another run"
            return None

        there = (name for name, cell in known.items() if self.run(cell).run_file.exists())
        return {name: found for name in there if (found := reason(name))}

    def _difference(self, cell: Cell, parent: Cell | None) -> str | None:
        run = self.run(cell)
        if cell.identity is not None:
            start = start_of(str(self.run(parent).path)) if parent else None
            return run.difference({**cell.identity, "start": start})
        if cell.planned_from is not None and run.read_run().get("identity") is not None:
            return "its config has not been resolved since the study changed; `lightning-em study expand` does that"
        return None

    def refuse_other(self, name: str) -> None:
        """Check that the folder holds no study of another name.

        Raises:
            ValueError: If the folder holds another study.
        """
        try:
            there = self.name
        except (ValueError, KeyError):  # there is no readable study to protect
            return
        if there != name:
            raise ValueError(
                f"{self.root} holds the study {there!r}, not {name!r}: give this one another --root, or remove "
                f"{self.file}."
            )

    @property
    def rules(self) -> Mapping[str, Any]:
        """Fields of the `Rules` of the study's claims."""
        return dict(self._read().get("claims", {}))

    def write(self, name: str, cells: Iterable[Cell], rules: Mapping[str, Any] | None = None) -> None:
        """Write `study.json` atomically.

        Raises:
            ValueError: If the folder holds another study, two cells share a run folder, or a cell starts from a
                run that is not in the study.
        """
        self.refuse_other(name)
        cells = list(cells)
        runs = [cell.run for cell in cells]
        if twice := sorted({run for run in runs if runs.count(run) > 1}):
            raise ValueError(f"each cell needs a run folder of its own; used more than once: {twice}.")
        if lost := sorted({cell.init_from for cell in cells if cell.init_from} - set(runs)):
            raise ValueError(f"cells start from runs {lost} that are no cells of the study.")
        content = {"schema": STUDY_SCHEMA, "name": name, "cells": [asdict(cell) for cell in cells]}
        content |= {"claims": dict(rules or {})}
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(content, indent=1) + "\n")

    def _is_finished(self, cell: Cell) -> bool:
        return bool(self.run(cell).read_run().get("status") == "finished")

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
