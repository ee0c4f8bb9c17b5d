"""Worker processes that run many tasks each, since importing takes as long as a fit.

The parent never imports torch; `serve` imports it in the worker.
"""

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
from lightning_em.preflight import num_processes, settings_of
from lightning_em.study.schedule import Task

# A new interpreter for each worker: CUDA and OpenMP do not work in a fork of a process that has used them.
START_METHOD: Literal["spawn", "forkserver"] = "spawn"
GRACE_SECONDS = 30.0
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")


class Outcome(NamedTuple):
    """How a task ended.

    Attributes:
        task: Task that ended.
        seconds: Wall-clock time since the task started.
        cpu_seconds: CPU time of the worker for the task.
        reason: Reason why the task failed; None if it succeeded.
        died: Whether the worker died while it ran the task.
    """

    task: Task
    seconds: float
    cpu_seconds: float = 0.0
    reason: str | None = None
    died: bool = False


class Worker:
    """One worker process, started at once.

    Args:
        log: File for everything that the process prints.
        threads: Number of torch threads.
        environment: Environment variables of the process; those of this process if not given.
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
        theirs.close()  # the worker holds the only other end, so its death closes the pipe and wakes `ready`

    def give(self, task: Task) -> None:
        """Start a task; the worker must be idle."""
        assert self.task is None, f"{self.process.name} is busy with {self.task}"
        self.task, self.started = task, time.monotonic()
        with contextlib.suppress(OSError):  # the worker died while idle; `outcome` reports that
            self.connection.send((task.kind, task.arguments))

    def outcome(self) -> Outcome | None:
        """Read how the task ended; None if an idle worker died. Call it when the connection is ready."""
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
        """Whether the process is running."""
        alive: bool = self.process.is_alive()
        return alive

    def dismiss(self) -> None:
        """Shut down an idle worker: it ends when the pipe is closed."""
        self.connection.close()

    def interrupt(self) -> None:
        """Ask the worker to save its run and end; sends SIGTERM."""
        if self.is_alive:
            self.process.terminate()


def environments(
    workers: int, runs: Sequence[Sequence[str]], environment: Mapping[str, str] = os.environ
) -> list[dict[str, str]]:
    """Environment variables of each worker; several workers on GPUs get separate GPUs.

    Args:
        workers: Number of workers.
        runs: Command-line arguments of the runs that the workers will do.
        environment: Environment variables of this process.

    Raises:
        ValueError: If the workers need more GPUs at a time than there are.
    """
    gpus = visible_gpus(environment)
    if workers < 2 or not gpus:
        return [dict(environment)] * workers
    trainers = (settings_of(args, "trainer") for args in runs)
    asking = [num_processes(each) or 1 for each in trainers if each.get("accelerator") != "cpu"]
    # Any worker may be given any run, so each gets as many GPUs as the largest run asks for.
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
    # More workers than places are possible only if no run asks for a GPU.
    return [{**environment, VISIBLE: ",".join(own[number % places])} for number in range(workers)]


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them; all GPUs of the machine if it is not set.

    They are counted in /dev, since asking CUDA would import torch and create a context.
    """
    listed = environment.get(VISIBLE)
    if listed is None:
        return [str(number) for number, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]
    names = [name.strip() for name in listed.split(",")]
    return [] if names[0] in ("", "-1", "NoDevFiles") else names


def ready(workers: list[Worker], seconds: float) -> list[Worker]:
    """Workers that have reported an outcome or died; waits at most `seconds` for the first."""
    connections = wait([worker.connection for worker in workers], seconds)
    return [worker for worker in workers if worker.connection in connections]


def end_all(workers: list[Worker], at_once: bool) -> None:
    """End the workers; those that are still running after `GRACE_SECONDS` are killed.

    Args:
        workers: Workers to end.
        at_once: Whether to interrupt them, so that a busy worker saves its run first. Otherwise all must be idle.
    """
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
    """Main function of a worker process: run tasks until the pipe is closed.

    Args:
        connection: Pipe that tasks arrive on and outcomes are sent to.
        log: File for everything that the process prints.
        threads: Number of torch threads.
        environment: Environment variables of the process.
        allowed: Packages whose classes configs may name.
    """
    _follow_parent()
    os.environ.clear()
    os.environ.update(environment)
    _write_to(Path(log))
    # After the environment is set: CUDA reads CUDA_VISIBLE_DEVICES once, when it is initialized.
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
            raise  # the worker was told to stop; the run is continued later
        except (Exception, SystemExit) as error:  # noqa: BLE001 (one run's trouble is not the next one's)
            traceback.print_exc()
            code = error.code or 0 if isinstance(error, SystemExit) else None
            said = f"exit code {code}" if isinstance(code, int) else error
            reason = f"{type(error).__name__}: {said}"
            if gpu_is_lost():
                # Counts as a dead worker: the task is retried in another process, up to the same limit.
                os._exit(1)
        tidy()  # after the handler: until it ends, the traceback of `error` keeps the task's objects alive
        connection.send((reason, time.process_time() - before))


def _follow_parent() -> None:
    """End this process when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # sys.exit would end this thread only

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()


def _write_to(log: Path) -> None:
    """Redirect standard output and standard error of this process to a file, also for native code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
