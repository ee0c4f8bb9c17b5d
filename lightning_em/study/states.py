"""States of the runs of a study, and an estimate of the time left. Importing this module loads no torch."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from rich.table import Table

from lightning_em.analysis.cells import DEFAULT_WORLD, StudyFolder
from lightning_em.runs import RunFolder
from lightning_em.study.plan import PlannedRun, Study, with_identities
from lightning_em.study.schedule import Task

TO_DO, DIFFERS, FINISHED = "to do", "differs", "finished"
GUESSED_SECONDS_PER_RUN = 12.0
COMPARE_SECONDS = 5.0


class Standing(NamedTuple):
    """State of a planned run.

    Attributes:
        state: `to do`; `differs` if the folder holds another run; else the status of the run.
        reason: What differs; None if nothing does.
    """

    state: str
    reason: str | None = None


def standings(study: Study) -> dict[str, Standing]:
    """State of each run of a study, by name.

    Resolves the config of a recorded run whose identity is missing from study.json or out of date; this needs torch.
    """
    folder = StudyFolder(study.root)
    study = with_identities(study, begun(study))
    differing = folder.differences(run.cell for run in study.runs)
    found = {}
    for run in study.runs:
        here = folder.run(run.cell)
        if run.name in differing:
            found[run.name] = Standing(DIFFERS, differing[run.name])
        else:
            found[run.name] = Standing(here.status() if here.run_file.exists() else TO_DO)
    return found


def begun(study: Study) -> list[str]:
    """Names of the runs whose run.json records an identity to compare with."""
    folder = StudyFolder(study.root)
    return [run.name for run in study.runs if folder.run(run.cell).read_run().get("identity") is not None]


class Budget(NamedTuple):
    """Estimate of the work that is left.

    Attributes:
        runs: Number of runs.
        done: Number of runs that are finished.
        seconds: Estimated time of the remaining tasks, one after the other.
        basis: Source of the estimate.
        comparisons: Number of groups of runs that are left to compare.
    """

    runs: int
    done: int
    seconds: float
    basis: str
    comparisons: int

    def sentence(self, workers: int) -> str:
        """Describe the budget in a sentence.

        Args:
            workers: Number of runs at a time.
        """
        minutes, groups = self.seconds / 60, f"group{'s' if self.comparisons > 1 else ''} to compare"
        also = f" and {self.comparisons} {groups}" if self.comparisons else ""
        processes = f"{workers} worker{'s' if workers > 1 else ''}"
        return (
            f"{self.runs} runs, {self.done} done; {self.runs - self.done} to do{also}: about "
            f"{minutes:.0f} CPU minutes, {minutes / workers:.0f} with {processes} ({self.basis})"
        )


def budget_of(runs: Sequence[PlannedRun], tasks: Sequence[Task], durations: "Durations") -> Budget:
    """Add up the estimated durations of the remaining tasks.

    Args:
        runs: Selected runs, finished or not.
        tasks: Tasks that are left.
        durations: Estimates of the durations.
    """
    fits, comparisons = (sum(task.kind == kind for task in tasks) for kind in ("fit", "compare"))
    seconds = sum(durations.of(tasks).values())
    return Budget(len(runs), len(runs) - fits, seconds, durations.basis, comparisons)


class Durations:
    """Estimated durations of runs.

    The estimate is the median over finished runs of the same arm and adapter; without any, the median over all
    finished runs; without these, the study's `seconds_per_run` or a default. Runs that were continued do not count.

    Args:
        study: The planned study.
        runs: Runs to measure and to estimate.
    """

    def __init__(self, study: Study, runs: Iterable[PlannedRun]) -> None:
        self._measured: dict[tuple[str, str], list[float]] = {}
        self._guess = study.seconds_per_run or GUESSED_SECONDS_PER_RUN
        self._runs = {run.name: run for run in runs}
        for run in self._runs.values():
            record = RunFolder(study.root / run.name).read_run()
            attempts = record.get("attempts", [])
            if record.get("status") == "finished" and len(attempts) == 1 and "ended" in attempts[0]:
                self.add(run, _seconds(attempts[0]["started"], attempts[0]["ended"]))

    def add(self, run: PlannedRun, seconds: float) -> None:
        """Record the duration of a run."""
        self._measured.setdefault((run.cell.arm, run.cell.adapter), []).append(seconds)

    def of(self, tasks: Iterable[Task]) -> dict[str, float]:
        """Estimated duration of each task in seconds, by name."""
        return {
            task.name: COMPARE_SECONDS if task.kind == "compare" else self._of_run(self._runs[task.name])
            for task in tasks
        }

    def _of_run(self, run: PlannedRun) -> float:
        alike = self._measured.get((run.cell.arm, run.cell.adapter))
        return statistics.median(alike or self._all or [self._guess])

    @property
    def basis(self) -> str:
        """Source of the estimates, in words."""
        measured = len(self._all)
        return f"measured on {measured} finished runs" if measured else f"guess: {self._guess:g} s a run"

    @property
    def _all(self) -> list[float]:
        return [seconds for each in self._measured.values() for seconds in each]


def status_table(study: Study, found: Mapping[str, Standing]) -> Table:
    """Table of the seeds in each state: one row per arm and world, one column per adapter."""
    cells = [run.cell for run in study.runs]
    adapters = list(dict.fromkeys(cell.adapter for cell in cells))
    table = Table("arm", *adapters, title=f"study {study.name} in {study.root}", caption="seeds by state")
    rows: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}
    for run in study.runs:
        cell = run.cell
        states = rows.setdefault((cell.arm, cell.world), {}).setdefault(cell.adapter, {})
        states.setdefault(found[run.name].state, []).append(cell.seed)
    for (arm, world), by_adapter in sorted(
        rows.items(), key=lambda row: [cell.arm for cell in cells].index(row[0][0])
    ):
        name = arm if world == DEFAULT_WORLD else f"{arm} ({world})"
        table.add_row(name, *(_states(by_adapter.get(adapter, {})) for adapter in adapters))
    return table


def _states(states: dict[str, list[int]]) -> str:
    return ", ".join(f"{state} {' '.join(map(str, seeds))}" for state, seeds in states.items()) or "-"


def _seconds(started: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
