"""Long-lived processes that do one task after the other: importing costs as much as a fit. Never imports torch."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_em import imports
from lightning_em.launch import num_processes, settings_of
from lightning_em.study.schedule import Task

# A fresh interpreter each: a fork of one that has touched a GPU, or OpenMP, cannot use it.
START_METHOD: Literal["spawn", "forkserver"] = "spawn"
GRACE_SECONDS = 30.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")


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
        environment: Its variables; those of this process if not given.
    """

    def __init__(self, log: Path, threads: int = 1, environment: Mapping[str, str] = os.environ) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self.task: Task | None = None
        self.log = log
        self.started = 0.0
        self.connection, theirs = context.Pipe()
        arguments = (theirs, str(log), threads, dict(environment), imports.allowed())
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


def environments(
    workers: int, runs: Sequence[Sequence[str]], environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """The variables of each worker, where there are several and GPUs: each gets its own.

    Args:
        workers: How many.
        runs: Command-line arguments of the runs they will do.
        environment: Of this process.

    Raises:
        ValueError: If the runs ask for more GPUs at a time than there are.
    """
    gpus = visible_gpus(environment)
    if workers < 2 or not gpus:
        return [dict(environment)] * workers
    trainers = (settings_of(args, "trainer") for args in runs)
    asking = [num_processes(each) or 1 for each in trainers if each.get("accelerator") != "cpu"]
    share = max(asking, default=1)
    places = len(gpus) // share
    if asking and workers > places:
        raise ValueError(
            f"--workers {workers} needs {workers * share} GPUs, as its runs ask for {share} each (trainer.devices), "
            f"and there are {len(gpus)}: "
            + (f"give --workers {places}" if places else "ask for fewer")
            + ", or set trainer.accelerator: cpu in the study."
        )
    own = [gpus[place * share : (place + 1) * share] for place in range(places)]
    return [{**environment, VISIBLE: ",".join(own[number % places])} for number in range(workers)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them; without it, all of the machine."""
    listed = environment.get(VISIBLE)
    if listed is None:
        return [str(number) for number, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]
    names = [name.strip() for name in listed.split(",")]
    return [] if names[0] in ("", "-1", "NoDevFiles") else names


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

    from lightning_em.callbacks.signals import Interrupted
    from lightning_em.logs import log_to_stderr
    from lightning_em.study.work import KINDS, gpu_is_lost, tidy

    log_to_stderr()
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
        except Interrupted:
            raise  # it was told to stop, and another worker goes on
        except (Exception, SystemExit) as error:  # noqa: BLE001 (one run's trouble is not the next one's)
            traceback.print_exc()
            code = error.code or 0 if isinstance(error, SystemExit) else None
            said = f"exit code {code}" if isinstance(code, int) else error
            reason = f"{type(error).__name__}: {said}"
            if gpu_is_lost():
                os._exit(1)  # as one that died: the task goes to another worker, as often as any
        tidy()  # behind the handler, whose error holds what the task held
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
