"""One process at a time writes into a run folder."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lightning_em.lock import LOCK, STALE_SECONDS, LockedError, RunLock, is_held, refuse_if_held


def hold(folder: str, ready: "multiprocessing.connection.Connection") -> None:
    with RunLock(Path(folder), ["fit"]):
        ready.send(os.getpid())
        time.sleep(60)


@pytest.fixture
def other_process(tmp_path: Path):
    """A process that holds `tmp_path / "run"`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), theirs))
    process.start()
    assert ours.recv() == process.pid
    yield process
    process.kill()
    process.join()
    ours.close()
    theirs.close()


def test_a_live_holder_is_named(other_process, tmp_path) -> None:
    for attempt in (lambda: RunLock(tmp_path / "run").__enter__(), lambda: refuse_if_held(tmp_path / "run")):
        with pytest.raises(
            LockedError, match=rf"in use by process {other_process.pid} on {os.uname().nodename}"
        ):
            attempt()


def test_a_dead_holder_is_taken_over(other_process, tmp_path) -> None:
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.join()
    assert (tmp_path / "run" / LOCK).exists()
    assert not is_held(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        assert is_held(tmp_path / "run")


def test_nothing_is_left_behind(tmp_path) -> None:
    with RunLock(tmp_path / "run", ["fit", "--api_key", "sk-not-to-be-written-0123"]):
        content = (tmp_path / "run" / LOCK).read_text()
        assert json.loads(content)["pid"] == os.getpid()
        assert "sk-not" not in content
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["file"]


def test_another_machine_counts_as_alive_until_its_heart_stops(tmp_path) -> None:
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "node17", "pid": 1}))
    assert is_held(tmp_path)
    os.utime(lock, (time.time() - STALE_SECONDS - 1,) * 2)
    assert not is_held(tmp_path)


@pytest.mark.parametrize(
    ("now", "taken"),
    [
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}, True),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, False),  # the same start, from another node
        ({"SLURM_JOB_ID": "77"}, False),
        ({"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "2"}, False),
        ({"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}, False),
        ({}, False),
    ],
)
def test_a_requeued_job_takes_the_lock_of_its_earlier_start(tmp_path, monkeypatch, now, taken) -> None:
    """It was killed on another node, whose kernel cannot tell us so."""
    folder = tmp_path / "run"
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(folder):
        left_behind = (folder / LOCK).read_text()
    folder.mkdir()
    (folder / LOCK).write_text(left_behind)
    monkeypatch.undo()
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    assert is_held(folder) is not taken
    if taken:
        with RunLock(folder):
            assert json.loads((folder / LOCK).read_text())["restarts"] == 2


@pytest.mark.parametrize("array", [True, False])
def test_a_holder_outside_slurm_is_nobodys_past(tmp_path, monkeypatch, array) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "node17", "pid": 1, "job": "77" if array else None}))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_held(tmp_path)
