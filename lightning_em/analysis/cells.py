"""The cells of a study: which run plays which role, and where its folder is. Never imports torch."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from lightning_em.manifest import write_atomically
from lightning_em.redaction import redacted_words
from lightning_em.runs import RunFolder

STUDY_SCHEMA = 1
DEFAULT_WORLD = "default"
MOST_SEEDS = 16
"""That the exact test of a claim takes."""
_SAID_BY_A_JOB = ("--trainer.num_nodes", "--trainer.devices")
_NO_PART_OF_A_RUN = ("--allow_import=", "--run.", "--trainer.enable_progress_bar=")
_SHOWN_WORDS = 3


@dataclass(frozen=True)
class Plan:
    """What makes a planned run that run, so that another one in its folder is told from it.

    Attributes:
        words: Of its command line, those that say what the run is.
        files_sha256: Hash over what all YAML files say that the words name.
        recipes: Hashes of the recipes of the miniature worlds that are named.
        identity: Of its resolved config, once somebody has resolved it (`study expand`).
    """

    words: tuple[str, ...]
    files_sha256: str
    recipes: tuple[str, ...] = ()
    identity: str | None = field(default=None, compare=False)

    @classmethod
    def from_fields(cls, content: Mapping[str, Any]) -> "Plan":
        """Back from JSON, which has no tuples."""
        lists = {key: tuple(content[key]) for key in ("words", "recipes")}
        return cls(**lists, files_sha256=content["files_sha256"], identity=content.get("identity"))

    def difference(self, record: Mapping[str, Any]) -> str | None:
        """What tells the run of a run.json from this one; None if nothing on record does.

        A run of the study notes its own plan; one that was started otherwise is known by its command line, or
        by its identity.
        """
        if self.identity is not None and record.get("identity") == self.identity:
            return None
        if noted := record.get("plan"):
            other = Plan.from_fields(noted)
        elif command := record.get("command"):
            other = Plan(run_words(_without_devices(command[2:])), self.files_sha256, self.recipes)
        else:
            return None
        if other.words != self.words:
            return f"it was run with {_lacking(other, self)}, planned is {_lacking(self, other)}"
        if other.recipes != self.recipes:
            return "its miniature world had another recipe"
        return None if other == self else "a YAML file that it names said something else"


def run_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line that say what a run is, without secrets."""
    return tuple(word for word in redacted_words(list(words)) if not word.startswith(_NO_PART_OF_A_RUN))


def _without_devices(words: Sequence[str]) -> list[str]:
    """Without the last words of configs/slurm/fit.sbatch, which say on how many devices a run is: no part of it."""
    flags = {index for index, word in enumerate(words) if word in _SAID_BY_A_JOB}
    return [word for index, word in enumerate(words) if index not in flags and index - 1 not in flags]


def start_difference(run: RunFolder, parent: RunFolder) -> str | None:
    """Whether a run began with another adapter than the run it starts from has now; None if that is not known."""
    began = (run.read_run().get("init_from") or {}).get("adapter_sha256")
    now = parent.last_adapter_sha256()
    if None in (began, now) or began == now or not run.steps():
        return None
    return f"it began with another adapter than {parent.path.name} has now"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        run: Its folder below the study's root.
        arm: Name of the arm in the study's file.
        role: What the arm is for, e.g. `general`, `narrow`, `reverted`; claims are made of roles.
        level: The arm's number (a KL weight, a share, a number of rows); None where it has none.
        adapter: Adapter type, e.g. `rank32`.
        world: `default`, `control`.
        seed: Training seed, the unit of inference.
        init_from: Run it starts from; None for a fresh adapter.
        plan: What the run has to be; None if any run in its folder will do.
    """

    run: str
    arm: str
    role: str
    level: float | None
    adapter: str
    world: str
    seed: int
    init_from: str | None = None
    plan: Plan | None = None

    @classmethod
    def from_fields(cls, content: Mapping[str, Any]) -> "Cell":
        """Back from JSON; keys of later versions are passed over."""
        known = {each.name for each in fields(cls)} - {"plan"}
        plan = Plan.from_fields(content["plan"]) if content.get("plan") else None
        return cls(**{key: value for key, value in content.items() if key in known}, plan=plan)


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
        content = self._read()
        try:
            return [Cell.from_fields(cell) for cell in content["cells"]]
        except (AttributeError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def run(self, cell: Cell) -> RunFolder:
        """The run folder of a cell; it need not exist."""
        return RunFolder(self.root / cell.run)

    def plans(self) -> dict[str, Plan]:
        """What was planned, by run folder; empty where no study can be read."""
        try:
            return {cell.run: cell.plan for cell in self.cells() if cell.plan is not None}
        except ValueError:
            return {}

    def finished(self) -> list[Cell]:
        """The cells whose run is finished, and is the one that the cell says."""
        left_out = self.left_out()
        return [cell for cell in self.cells() if self._is_finished(cell) and cell.run not in left_out]

    def left_out(self) -> dict[str, str]:
        """Why finished runs are not the ones that their cells say, by run folder."""
        cells = self.cells()
        differing = self.differences(cells)
        return {
            cell.run: differing[cell.run]
            for cell in cells
            if cell.run in differing and self._is_finished(cell)
        }

    def differences(
        self, cells: Iterable[Cell], look: Callable[[RunFolder], str | None] | None = None
    ) -> dict[str, str]:
        """Why the runs that are there are not the ones that cells say, by run folder, as far as it is on record.

        Args:
            cells: With those they start from.
            look: At what else may tell a run from its cell.
        """
        known = {cell.run: cell for cell in cells}

        @cache
        def reason(name: str) -> str | None:
            cell = known[name]
            run = self.run(cell)
            found = cell.plan.difference(run.read_run()) if cell.plan else None
            found = found or (look(run) if look else None)
            if found or cell.init_from is None:
                return found
            parent = known[cell.init_from]
            if self._is_finished(cell) and not self._is_finished(parent):
                return f"the run it starts from, {parent.run}, is not finished"
            if found := start_difference(run, self.run(parent)):
                return found
            return f"it starts from {parent.run}, which is another run" if reason(parent.run) else None

        there = (name for name, cell in known.items() if self.run(cell).run_file.exists())
        return {name: found for name in there if (found := reason(name))}

    def refuse_other(self, name: str) -> None:
        """See to it that the folder is this study's.

        Raises:
            ValueError: If another study is there.
        """
        try:
            there = self.name
        except (ValueError, KeyError):
            return
        if there != name:
            raise ValueError(
                f"{self.root} holds the study {there!r}, not {name!r}: give this one another --root, or remove "
                f"{self.file}."
            )

    @property
    def rules(self) -> Mapping[str, Any]:
        """Fields of the `Rules` of its claims."""
        return dict(self._read().get("claims", {}))

    def write(self, name: str, cells: Iterable[Cell], rules: Mapping[str, Any] | None = None) -> None:
        """Write `study.json` in one step.

        Raises:
            ValueError: If another study is here, two cells have one run folder, or a cell starts from a run that
                is not in the study.
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


def _lacking(plan: Plan, other: Plan) -> str:
    """The words of a plan that another one has not."""
    own = [word for word in plan.words if word not in other.words]
    more = f" and {len(own) - _SHOWN_WORDS} words more" if len(own) > _SHOWN_WORDS else ""
    return f"{' '.join(own[:_SHOWN_WORDS])}{more}" if own else "no word of its own"
