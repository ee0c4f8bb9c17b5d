"""Run a study: all unfinished runs, parents first, several at a time. Tasks of dead workers are retried."""

import signal
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from lightning_em import imports, lock
from lightning_em.analysis.cells import StudyFolder
from lightning_em.analysis.pairs import ROLES, SOLUTIONS
from lightning_em.study.plan import PlannedRun, Study, with_identities
from lightning_em.study.progress import Display
from lightning_em.study.schedule import Schedule, State, Task
from lightning_em.study.states import FINISHED, Durations, begun, budget_of, standings
from lightning_em.study.workers import Outcome, Worker, end_all, environments, ready

MOST_DEATHS = 3  # a task fails when this many workers have died while running it
QUIET = "--trainer.enable_progress_bar=false"  # added to every fit; a device setting, so not part of the run's identity
PAIRS = "pair analyses"


def run_study(
    study: Study,
    runs: Sequence[PlannedRun] | None = None,
    workers: int = 2,
    threads: int = 1,
    console: Console | None = None,
) -> int:
    """Run the unfinished runs, then compare the runs of each group.

    Args:
        study: The planned study.
        runs: Selected runs of the study, including those they start from; all runs if not given.
        workers: Number of worker processes, each of which runs one task at a time.
        threads: Number of torch threads in each worker.
        console: Console for the progress table; standard output if not given.

    Returns:
        Exit code: 0 if every task is done, 1 if one failed or was skipped.

    Raises:
        ValueError: If the root holds another study or is in use, there are too few GPUs for the workers, or `workers`
            or `threads` is below 1.
    """
    if workers < 1 or threads < 1:
        raise ValueError(f"--workers and --threads must be at least 1, got {workers} and {threads}.")
    console, runs = console or Console(), list(study.runs) if runs is None else list(runs)
    with lock.RunLock(study.root, ["study", "run", str(study.file)]):
        folder, names = StudyFolder(study.root), {run.name for run in runs}
        folder.refuse_other(study.name)
        study = with_identities(study, begun(study))
        runs = [run for run in study.runs if run.name in names]
        folder.write(study.name, [run.cell for run in study.runs], asdict(study.rules))
        schedule, durations = Schedule(tasks_of(study, runs)), Durations(study, runs)
        left = [run.args for run in runs if run.name in schedule.states]
        own = environments(min(workers, len(schedule.tasks)), left)
        console.print(budget_of(runs, schedule.tasks, durations).sentence(workers))
        display = Display(console, schedule, durations.of(schedule.tasks))
        try:
            _Crew(study, schedule, own, threads, display).work()
        finally:
            _write_identities(study, schedule)
    for name, reason in schedule.reasons.items():
        console.print(f"{schedule.states[name]}: {name}: {reason}", style="red", markup=False)
    return 0 if not schedule.reasons else 1


def _write_identities(study: Study, schedule: Schedule) -> None:
    """Add the identities of finished runs to study.json.

    They are read from run.json, where the worker has written them: resolving the configs here would import torch.
    """
    folder, cells = StudyFolder(study.root), []
    for cell in (run.cell for run in study.runs):
        if cell.identity is None and schedule.states.get(cell.run) == State.DONE:
            identity = folder.run(cell).read_run()["identity"]
            cell = replace(cell, identity={key: identity[key] for key in ("name", "config")})  # noqa: PLW2901
        cells.append(cell)
    folder.write(study.name, cells, asdict(study.rules))


def tasks_of(study: Study, runs: Sequence[PlannedRun]) -> list[Task]:
    """Tasks for the unfinished runs and for the comparisons; each comes after the tasks that it depends on."""
    done = {name for name, standing in standings(study).items() if standing.state == FINISHED}
    left = [run for run in runs if run.name not in done]
    names, allowed = {run.name for run in left}, imports.as_args()
    tasks = []
    for run in left:
        # A finished parent has no task in the schedule, so it is not a dependency.
        parent = run.cell.init_from if run.cell.init_from in names else None
        args = [*run.args, QUIET, *allowed]
        tasks.append(Task(run.name, "fit", (args,), (parent,) if parent else (), group=run.cell.arm))
    return tasks + _comparisons(study, runs, names, done)


def _comparisons(
    study: Study, runs: Sequence[PlannedRun], left: Collection[str], done: Collection[str]
) -> list[Task]:
    """Tasks for the pair analyses of each adapter, world and seed whose general and narrow run is chosen or done.

    Such a task needs the general and the narrow run. It waits for the chosen runs of the other roles as well, but is
    not skipped if one of them fails.
    """
    tasks = []
    chosen = {run.name for run in runs if run.cell.role in ROLES}
    for group in dict.fromkeys(_group(run) for run in runs if run.name in chosen):
        members = {
            run.cell.role: run.name
            for run in study.runs
            if _group(run) == group and (run.name in chosen or run.name in done)
        }
        if not set(SOLUTIONS) <= set(members):
            continue
        compared = {role: members[role] for role in ROLES if members.get(role) in left}
        needs = [compared.pop(role) for role in SOLUTIONS if role in compared]
        name = "pairs of " + "-".join(map(str, group))
        arguments = (str(study.root), *group)
        tasks.append(Task(name, "compare", arguments, tuple(needs), tuple(compared.values()), PAIRS))
    return tasks


def _group(run: PlannedRun) -> tuple[str, str, int]:
    return run.cell.adapter, run.cell.world, run.cell.seed


class _Crew:
    """Pool of workers that run the tasks of a schedule, one worker for each environment.

    Args:
        study: The planned study.
        schedule: Tasks to run.
        environments: Environment variables of each worker.
        threads: Number of torch threads in each worker.
        display: Display of the progress.
    """

    def __init__(
        self,
        study: Study,
        schedule: Schedule,
        environments: Sequence[Mapping[str, str]],
        threads: int,
        display: Display,
    ) -> None:
        self.study, self.schedule, self.display, self.threads = study, schedule, display, threads
        self.environments = environments
        self.workers: list[Worker] = []
        self.deaths: Counter[str] = Counter()

    def work(self) -> None:
        """Run tasks until every one is done, failed or skipped."""
        with self.display, _stopping_on_sigterm():
            try:
                while not self.schedule.is_over:
                    self._hire()
                    self._distribute()
                    # Returns within a second, so that the display is updated.
                    for worker in ready(self.workers, 1.0):
                        self._note(worker)
                    self.display.update()
            except BaseException:  # also KeyboardInterrupt, and SystemExit on SIGTERM
                end_all(self.workers, at_once=True)
                raise
            end_all(self.workers, at_once=False)

    def _hire(self) -> None:
        # A dead worker that still has a task stays until `_note` has read how it ended.
        self.workers = [worker for worker in self.workers if worker.is_alive or worker.task]
        taken = {worker.log for worker in self.workers}
        for number, environment in enumerate(self.environments):
            log = self._log(number)
            if log not in taken:
                self.workers.append(Worker(log, self.threads, environment))

    def _log(self, number: int) -> Path:
        return self.study.root / f"worker-{number}.log"

    def _distribute(self) -> None:
        for worker in self.workers:
            if worker.task is None and (task := self.schedule.next()) is not None:
                if task.kind == "compare":  # a comparison reads the identities of finished runs in study.json
                    _write_identities(self.study, self.schedule)
                worker.give(task)

    def _note(self, worker: Worker) -> None:
        outcome = worker.outcome()
        if outcome is None:
            return
        if outcome.died and self._may_try_again(outcome):
            self.schedule.put_back(outcome.task)
            self.display.say(f"{outcome.task.name}: {outcome.reason}; it is continued by another one")
        elif outcome.reason is None:
            self.schedule.finish(outcome.task)
            self.display.done(outcome.task, outcome.seconds, outcome.cpu_seconds)
        else:
            skipped = self.schedule.fail(outcome.task, outcome.reason)
            also = f" ({len(skipped)} that need it are skipped)" if skipped else ""
            self.display.say(f"{State.FAILED}: {outcome.task.name}: {outcome.reason}{also}")

    def _may_try_again(self, outcome: Outcome) -> bool:
        self.deaths[outcome.task.name] += 1
        return self.deaths[outcome.task.name] < MOST_DEATHS


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Make SIGTERM end the study as Ctrl-C does: every run saves a checkpoint and is continued next time."""
    if threading.current_thread() is not threading.main_thread():  # `signal.signal` would raise ValueError
        yield
        return

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
