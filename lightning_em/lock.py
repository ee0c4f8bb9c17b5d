"""Lock a run folder, so that only one process at a time writes into it. Never imports torch."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_em import slurm
from lightning_em.redaction import redacted_words

LOCK = "run.lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 300.0


class LockedError(ValueError):
    """Another live process holds the run; the message names it."""


class RunLock:
    """Hold the lock of a run folder while the context is open.

    The kernel releases its lock on `run.lock` when the process ends, however it ends. Some file systems do not
    carry such locks to other machines. There, the holder written into the file and its heartbeat (the file's mtime)
    decide: a holder on another machine counts as alive until its heartbeat is older than `STALE_SECONDS`, or until
    its own Slurm job is started again, which proves that it has ended.

    Args:
        folder: Run folder; created if missing, and removed again if it stays empty.
        args: Command line of this process, recorded for error messages of other processes.
    """

    def __init__(self, folder: Path, args: Sequence[str] = ()) -> None:
        self.path = folder / LOCK
        self.args = redacted_words(list(args))
        self._descriptor = -1
        self._stopped = threading.Event()

    def __enter__(self) -> "RunLock":
        """Acquire the lock.

        Raises:
            LockedError: If a live process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open_locked(self.path)
        if (other := _holder_elsewhere(self.path)) is not None:
            self._let_go()
            raise LockedError(_refusal(self.path, other))
        content = json.dumps(_myself(self.args)) + "\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content.encode(), 0)
        # a forked data worker must not keep the lock after we exit
        os.register_at_fork(after_in_child=self._let_go)
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock."""
        self._stopped.set()
        self.path.unlink(missing_ok=True)
        self._let_go()
        with contextlib.suppress(OSError):  # not empty, which is the normal case
            self.path.parent.rmdir()

    def _let_go(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a full or missing disk is reported by the code that writes data


def refuse_if_held(folder: Path) -> None:
    """Check the lock without taking it; cheap enough to run before heavy imports.

    Raises:
        LockedError: If a live process holds the folder.
    """
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(_refusal(path, _read(path))) from None
    finally:
        os.close(descriptor)
    if (other := _holder_elsewhere(path)) is not None:
        raise LockedError(_refusal(path, other))


def is_held(folder: Path) -> bool:
    """Tell whether a live process is writing into the folder."""
    try:
        refuse_if_held(folder)
    except LockedError:
        return True
    return False


def is_first_rank() -> bool:
    """Tell whether this process is the writing rank of its job, judging by the environment."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0" and (name == "RANK" or os.environ.get("NODE_RANK", "0") == "0")
    return True


def _open_locked(path: Path) -> int:
    """Open and lock the lock file; retry if the file was replaced between opening and locking."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LockedError(_refusal(path, _read(path))) from None
        try:
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _holder_elsewhere(path: Path) -> dict[str, Any] | None:
    """Return the holder if it is alive on another machine; on this machine, the kernel's lock decides."""
    holder = _read(path)
    if holder.get("host") in (None, socket.gethostname()) or _is_my_past(holder):
        return None
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    return holder if age < STALE_SECONDS else None


def _is_my_past(holder: dict[str, Any]) -> bool:
    """Tell whether the holder is an earlier start of this same job, which Slurm has requeued."""
    mine = _job()
    same = mine["job"] is not None and all(holder.get(key) == mine[key] for key in ("job", "array_task"))
    return same and mine["restarts"] > (holder.get("restarts") or 0)


def _job() -> dict[str, Any]:
    names = {"job": "SLURM_JOB_ID", "array_task": "SLURM_ARRAY_TASK_ID"}
    return {key: os.environ.get(name) for key, name in names.items()} | {"restarts": slurm.restarts()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _myself(args: list[str]) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **_job(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": args,
    }


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return (
        f"{path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}, started "
        f"{holder.get('started', '?')}. Wait for it or stop it, or give this one another --run.name."
    )
