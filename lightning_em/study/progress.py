"""Progress table of a running study. Never imports torch."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_em.study.schedule import Schedule, State, Task

SECONDS_BETWEEN_LINES = 30.0
_COLUMNS = (State.DONE, State.RUNNING, State.FAILED, State.SKIPPED, State.WAITING)


class Display:
    """Counts of tasks: a live table by arm in a terminal, a line of totals at intervals elsewhere.

    Args:
        console: Console to print to.
        schedule: Schedule whose tasks are counted.
        expected: Expected duration of each task in seconds, by name.
    """

    def __init__(self, console: Console, schedule: Schedule, expected: dict[str, float]) -> None:
        self.console, self.schedule, self.expected = console, schedule, expected
        self._started = self._spoken = time.monotonic()
        self._spent = self._planned = 0.0  # measured and expected seconds of the finished tasks
        self._cpu_seconds = 0.0
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=1)

    def __enter__(self) -> "Display":
        self._started = self._spoken = time.monotonic()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        else:
            self.console.print(self.line(), markup=False, highlight=False)

    def done(self, task: Task, seconds: float, cpu_seconds: float) -> None:
        """Record the time that a finished task took."""
        self._cpu_seconds += cpu_seconds
        self._spent += seconds
        self._planned += self.expected[task.name]

    def say(self, text: str) -> None:
        """Print a line that stays above the live table."""
        self.console.print(text, markup=False, highlight=False)

    def update(self) -> None:
        """Print a progress line if there is no live table and the last line is old enough."""
        now = time.monotonic()
        if not self.console.is_terminal and now - self._spoken > SECONDS_BETWEEN_LINES:
            self._spoken = now
            self.console.print(self.line(), markup=False, highlight=False)

    def line(self) -> str:
        """Elapsed time, counts of all tasks, and the estimated time left."""
        counts = {state: len(self.schedule.named(state)) for state in _COLUMNS}
        listed = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        spent = (time.monotonic() - self._started) / 60
        left = f", about {self.minutes_left():.0f} min left" if not self.schedule.is_over else ""
        return f"{spent:.1f} min ({self._cpu_seconds / 60:.1f} CPU): {listed or 'nothing to do'}{left}"

    def table(self) -> Table:
        """Table of the counts by arm."""
        table = Table("arm", *_COLUMNS, caption=self.line())
        for group in dict.fromkeys(task.group for task in self.schedule.tasks):
            states = [self.schedule.states[task.name] for task in self.schedule.tasks if task.group == group]
            table.add_row(group, *(str(states.count(state) or "") for state in _COLUMNS))
        return table

    def minutes_left(self) -> float:
        """Estimated minutes left: expected durations, scaled by the measured pace and divided by the running tasks."""
        left = self.schedule.named(State.WAITING, State.RUNNING)
        running = max(1, len(self.schedule.named(State.RUNNING)))
        pace = self._spent / self._planned if self._planned else 1.0
        return sum(self.expected[task.name] for task in left) * pace / running / 60
