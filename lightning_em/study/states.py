"""Where the runs of a study stand, and what the rest will cost. Never imports torch."""

import hashlib
import re
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.redaction import redacted_words
from lightning_em.runs import RunFolder
from lightning_em.study.plan import PlannedRun, Study

TO_DO = "to do"
GUESSED_SECONDS_PER_RUN = 12.0
WORLD_SECONDS = 135.0  # one core, as the miniature's own README has it
# The engine's own choice for its workers, no part of what a run is.
QUIET = ("--trainer.enable_progress_bar=false",)
_BETWEEN_NAMES = re.compile(r"[\n\"'{}\[\],]|: | #")


def state_of(study: Study, run: PlannedRun) -> str:
    """Status of a run, or `to do`."""
    folder = RunFolder(study.root / run.name)
    return folder.status() if folder.run_file.exists() else TO_DO


def is_done(study: Study, run: PlannedRun) -> bool:
    """Whether a run is finished and was started by the words that are planned now, with files that said the same.

    Otherwise the command itself finds out whether it is still the same run. A run that notes no
    `files_sha256` is judged by its words.
    """
    record, words = RunFolder(study.root / run.name).read_run(), fit_words(run)
    command = _without_imports(record.get("command", [])[1:])
    if record.get("status") != "finished" or command != _without_imports(redacted_words(words)):
        return False
    return "files_sha256" not in record or record["files_sha256"] == files_sha256(words)


def files_sha256(words: Iterable[str]) -> str:
    """Hash over what all YAML files say that words name, and those that these name; data files are left out."""
    texts: dict[Path, str] = {}
    _gather("\n".join(word.partition("=")[2] for word in words), Path(), texts)
    return hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()


def fit_words(run: PlannedRun) -> list[str]:
    """The words by which the engine starts a run."""
    return ["fit", *run.words, *QUIET]


class Budget(NamedTuple):
    """What is left to do.

    Attributes:
        runs: How many runs there are.
        done: How many of them are finished.
        seconds: What the others will take on one core.
        basis: Where that comes from.
        worlds: How many miniature worlds have to be built first.
    """

    runs: int
    done: int
    seconds: float
    basis: str
    worlds: int

    def sentence(self, workers: int) -> str:
        """The budget in words.

        Args:
            workers: How many runs there are at a time.
        """
        worlds = f" and {self.worlds} worlds to build" if self.worlds else ""
        minutes = self.seconds / 60
        return (
            f"{self.runs} runs, {self.done} done; {self.runs - self.done} to do{worlds}: about {minutes:.0f} CPU "
            f"minutes, {minutes / workers:.0f} with {workers} workers ({self.basis})"
        )


def budget_of(study: Study, runs: Sequence[PlannedRun], worlds: int) -> Budget:
    """Add up what is left, by the durations of finished runs of the same arm and adapter where there are any."""
    seconds = Durations(study, runs)
    left = [run for run in runs if not is_done(study, run)]
    total = sum(seconds.of(run) for run in left) + worlds * WORLD_SECONDS
    return Budget(len(runs), len(runs) - len(left), total, seconds.basis, worlds)


class Durations:
    """How long runs take: measured where runs like it are finished, else their overall median, else a guess."""

    def __init__(self, study: Study, runs: Iterable[PlannedRun]) -> None:
        self._measured: dict[tuple[str, str], list[float]] = {}
        self._guess = study.seconds_per_run or GUESSED_SECONDS_PER_RUN
        for run in runs:
            record = RunFolder(study.root / run.name).read_run()
            attempts = record.get("attempts", [])
            if record.get("status") == "finished" and len(attempts) == 1 and "ended" in attempts[0]:
                self.add(run, _seconds(attempts[0]["started"], attempts[0]["ended"]))

    def add(self, run: PlannedRun, seconds: float) -> None:
        """Note what a run took."""
        self._measured.setdefault((run.cell.arm, run.cell.adapter), []).append(seconds)

    def of(self, run: PlannedRun) -> float:
        """What a run will take, in seconds."""
        alike = self._measured.get((run.cell.arm, run.cell.adapter))
        return statistics.median(alike or self._all or [self._guess])

    @property
    def basis(self) -> str:
        """Where the numbers come from."""
        measured = len(self._all)
        return f"measured on {measured} finished runs" if measured else f"guess: {self._guess:g} s a run"

    @property
    def _all(self) -> list[float]:
        return [seconds for each in self._measured.values() for seconds in each]


def status_table(study: Study) -> Table:
    """A row an arm and world, a column an adapter: which seeds are in which state."""
    cells = [run.cell for run in study.runs]
    adapters = list(dict.fromkeys(cell.adapter for cell in cells))
    table = Table("arm", *adapters, title=f"study {study.name} in {study.root}", caption="seeds by state")
    rows: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}
    for run in study.runs:
        cell = run.cell
        states = rows.setdefault((cell.arm, cell.world), {}).setdefault(cell.adapter, {})
        states.setdefault(state_of(study, run), []).append(cell.seed)
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


def _without_imports(words: Iterable[str]) -> list[str]:
    """What may be imported does not change a run."""
    return [word for word in words if not word.startswith("--allow_import=")]


def _gather(text: str, folder: Path, texts: dict[Path, str]) -> None:
    """Add the files that a text names, as they are seen from a folder."""
    for name in (part.strip("- \t\r") for part in _BETWEEN_NAMES.split(text)):
        file = (folder / name).resolve() if name.endswith((".yaml", ".yml")) else None
        if file and file not in texts and file.is_file():
            texts[file] = file.read_text(encoding="utf-8")
            _gather(texts[file], file.parent, texts)
