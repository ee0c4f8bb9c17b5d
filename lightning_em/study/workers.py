"""Long-lived processes that do one task after the other: importing costs as much as a fit. Never imports torch."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_em import imports
from lightning_em.study.schedule import Task

# A fresh interpreter each: a fork of one that has touched a GPU, or OpenMP, cannot use it.
START_METHOD: Literal["spawn", "forkserver"] = "spawn"
GRACE_SECONDS = 30.0


class Outcome(NamedTuple):
    """How a task ended.

    Attributes:
        task: Which one.
        seconds: From its start.
        cpu_seconds: Of its process.
        reason: Why it failed; None if it did not.
        died: Whether its worker died over it.
    """

    task: Task
    seconds: float
    cpu_seconds: float = 0.0
    reason: str | None = None
    died: bool = False


class Worker:
    """One process.

    Args:
        log: File for whatever it writes.
        threads: Of torch.
    """

    def __init__(self, log: Path, threads: int = 1) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self.task: Task | None = None
        self.log = log
        self.started = 0.0
        self.connection, theirs = context.Pipe()
        arguments = (theirs, str(log), threads, dict(os.environ), imports.allowed())
        self.process = context.Process(target=serve, args=arguments, name=log.stem, daemon=False)
        self.process.start()
        theirs.close()  # so that its death closes the pipe

    def give(self, task: Task) -> None:
        """Start a task; the worker must be idle."""
        assert self.task is None, f"{self.process.name} is busy with {self.task}"
        self.task, self.started = task, time.monotonic()
        with contextlib.suppress(OSError):  # it died while idle: the outcome says so
            self.connection.send((task.kind, task.arguments))

    def outcome(self) -> Outcome | None:
        """What became of the task; call it when the connection is ready. None if an idle worker died."""
        task, self.task = self.task, None
        seconds = time.monotonic() - self.started
        try:
            reason, cpu_seconds = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            reason = f"its worker died ({how}); see {self.log}"
            return Outcome(task, seconds, reason=reason, died=True) if task else None
        assert task is not None
        return Outcome(task, seconds, cpu_seconds, reason)

    @property
    def is_alive(self) -> bool:
        """Whether the process is there."""
        alive: bool = self.process.is_alive()
        return alive

    def dismiss(self) -> None:
        """Let an idle worker go home."""
        self.connection.close()

    def interrupt(self) -> None:
        """Ask it to save what it is doing and end."""
        if self.is_alive:
            self.process.terminate()


def ready(workers: list[Worker], seconds: float) -> list[Worker]:
    """The workers with news, which may be that they died; waits for some at most so long."""
    connections = wait([worker.connection for worker in workers], seconds)
    return [worker for worker in workers if worker.connection in connections]


def end_all(workers: list[Worker], at_once: bool) -> None:
    """End the workers: idle ones go, busy ones save first if `at_once`; whoever stays too long is killed."""
    for worker in workers:
        worker.interrupt() if at_once else worker.dismiss()
    end = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        if worker.is_alive:
            worker.process.kill()
            worker.process.join()


def serve(
    connection: Connection, log: str, threads: int, environment: dict[str, str], allowed: list[str]
) -> None:
    """What the process does: tasks as they come, until nobody sends any more."""
    _follow_parent()
    os.environ.clear()
    os.environ.update(environment)
    _write_to(Path(log))
    import torch

    from lightning_em.study.work import KINDS

    imports.restrict(allowed)
    torch.set_num_threads(threads)
    while True:
        try:
            kind, arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        reason, before = None, time.process_time()
        try:
            KINDS[kind](*arguments)
        except Exception as error:  # noqa: BLE001 (one run's trouble is not the next one's)
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        connection.send((reason, time.process_time() - before))


def _follow_parent() -> None:
    """End with the process that started this one, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def _write_to(log: Path) -> None:
    """Send what this process writes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
