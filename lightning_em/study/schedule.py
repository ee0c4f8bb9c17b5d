"""What can be done next: tasks that wait for others, and what becomes of those behind a failure. No torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where a task stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Task:
    """A piece of work for one worker.

    Attributes:
        name: Of the task; no two have the same.
        kind: What to do; a function of `work`.
        arguments: For it; plain values.
        needs: Names of the tasks that must be done before it.
        wants: Names of tasks that must be over before it, whether they succeeded or not.
        group: Under which the progress table counts it.
    """

    name: str
    kind: str
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    group: str = ""


@dataclass
class Schedule:
    """Tasks in the order in which they should be done, and their states.

    Attributes:
        tasks: All of them; one that is needed by another comes before it.
        states: By name.
        reasons: Why a task failed or was skipped, by name.
    """

    tasks: list[Task]
    states: dict[str, State] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: set[str] = set()
        for task in self.tasks:
            assert task.name not in known, f"two tasks are called {task.name}"
            assert known.issuperset((*task.needs, *task.wants)), f"{task.name} stands before what it needs"
            known.add(task.name)
        self.states = dict.fromkeys((task.name for task in self.tasks), State.WAITING)

    def next(self) -> Task | None:
        """The first task that can start now; None if all that is left waits for running ones."""
        for task in self.tasks:
            if self.states[task.name] is State.WAITING and self._is_ready(task):
                self.states[task.name] = State.RUNNING
                return task
        return None

    def put_back(self, task: Task) -> None:
        """A running task did not come to its end and may be tried again."""
        self.states[task.name] = State.WAITING

    def finish(self, task: Task) -> None:
        """A running task is done."""
        self.states[task.name] = State.DONE

    def fail(self, task: Task, reason: str) -> list[Task]:
        """A running task failed; what needs it is skipped.

        Returns:
            The skipped tasks.
        """
        self.states[task.name], self.reasons[task.name] = State.FAILED, reason
        skipped = []
        for later in self.tasks:
            lost = [need for need in later.needs if self.states[need] in (State.FAILED, State.SKIPPED)]
            if self.states[later.name] is State.WAITING and lost:
                self.states[later.name], self.reasons[later.name] = State.SKIPPED, f"needs {lost[0]}"
                skipped.append(later)
        return skipped

    def named(self, *states: State) -> list[Task]:
        """The tasks in some states."""
        return [task for task in self.tasks if self.states[task.name] in states]

    @property
    def is_over(self) -> bool:
        """Whether nothing is running or waiting."""
        return not self.named(State.WAITING, State.RUNNING)

    def _is_ready(self, task: Task) -> bool:
        over = (State.DONE, State.FAILED, State.SKIPPED)
        return all(self.states[need] is State.DONE for need in task.needs) and all(
            self.states[want] in over for want in task.wants
        )
