"""Schedule of tasks that depend on each other; a failed task skips those that need it. Never imports torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """State of a task."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Task:
    """A task for one worker.

    Attributes:
        name: Unique name of the task.
        kind: Kind of the task: a key of `work.KINDS`.
        arguments: Arguments of the function that runs the task; plain values.
        needs: Names of the tasks that must be done before this one starts; it is skipped if one of them fails.
        wants: Names of the tasks that must have ended before this one starts, whether they succeeded or not.
        group: Row of the progress table that counts the task.
    """

    name: str
    kind: str
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    group: str = ""


@dataclass
class Schedule:
    """Tasks in order of priority, and their states.

    Attributes:
        tasks: All tasks; each comes after the tasks it needs or wants.
        states: State of each task, by name.
        reasons: Reason why a task failed or was skipped, by name.
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
        """Start the first task that is ready; None if no waiting task is."""
        for task in self.tasks:
            if self.states[task.name] is State.WAITING and self._is_ready(task):
                self.states[task.name] = State.RUNNING
                return task
        return None

    def put_back(self, task: Task) -> None:
        """Return a running task that was cut short to the waiting ones, to be tried again."""
        self.states[task.name] = State.WAITING

    def finish(self, task: Task) -> None:
        """Mark a running task as done."""
        self.states[task.name] = State.DONE

    def fail(self, task: Task, reason: str) -> list[Task]:
        """Mark a running task as failed, and skip the tasks that need it.

        Returns:
            The skipped tasks.
        """
        self.states[task.name], self.reasons[task.name] = State.FAILED, reason
        skipped = []
        for later in self.tasks:  # dependents come later, so one pass skips indirect ones too
            lost = [need for need in later.needs if self.states[need] in (State.FAILED, State.SKIPPED)]
            if self.states[later.name] is State.WAITING and lost:
                self.states[later.name], self.reasons[later.name] = State.SKIPPED, f"needs {lost[0]}"
                skipped.append(later)
        return skipped

    def named(self, *states: State) -> list[Task]:
        """The tasks that are in one of these states."""
        return [task for task in self.tasks if self.states[task.name] in states]

    @property
    def is_over(self) -> bool:
        """Whether no task is running or waiting."""
        return not self.named(State.WAITING, State.RUNNING)

    def _is_ready(self, task: Task) -> bool:
        over = (State.DONE, State.FAILED, State.SKIPPED)
        return all(self.states[need] is State.DONE for need in task.needs) and all(
            self.states[want] in over for want in task.wants
        )
