"""F4, F6, F7, F8: on a signal, a run saves and reports it; if a rank dies, the whole job ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_em.records import read_results
from tests.faults.conftest import Case, Whole
from tests.faults.processes import Running, assert_published_are_valid, wait_for_checkpoint, wait_until
from tests.fitting import write_config
from tests.slurm.daemons import free_port

SLOW = 0.1
TWO_RANKS = ("--trainer", "configs/trainer/cpu_ddp2.yaml", "--trainer.max_epochs", "4")
# The rows have the order of 1 rank with batches of 6, so that results can be compared.
HALF_BATCHES = ("--data.batch_size", "3", "--data.kl_batch_size", "3")
REQUEUED = "SIGUSR1 in a Slurm job (scontrol replaced by a recorder): saved, requeued once, resumes"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a Slurm job with a scontrol that takes two seconds and records its calls."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\ncp "$RUN_FILE" "{tmp_path}/at_requeue" 2>/dev/null\nsleep 2\necho "$@" >> "{tmp_path}/calls"\n',
        encoding="utf-8",
    )
    scontrol.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242"}


@pytest.mark.fault("F4", "SIGTERM: checkpoint within a step, exit code 143, run.json preempted, same result")
def test_sigterm(whole: Whole) -> None:
    run = whole.folder("sigterm")
    tell = ["--allow_import", "tests", "--trainer.callbacks+=tests.faults.inject.Terminate"]
    ended = whole.fit("sigterm", *tell, "--trainer.callbacks.init_args.step=7")
    assert ended.code == 143, ended.output
    assert run.read_run()["status"] == "preempted"
    assert run.read_run()["exit_reason"].startswith("Interrupted: SIGTERM after step")
    assert run.steps()[-1] == run.read_run()["last_step"] == 7
    assert "the same command continues" in ended.output
    assert_published_are_valid(run)
    assert whole.fit("sigterm").code == 0
    whole.assert_same_result(run)


@pytest.mark.fault("F5", REQUEUED)
def test_sigusr1_saves_and_requeues_once(whole: Whole, tmp_path: Path, slurm: dict[str, str]) -> None:
    run = whole.folder("sigusr1")
    process = whole.start("sigusr1", slow=SLOW, **slurm)
    wait_for_checkpoint(run, process)
    process.send(signal.SIGUSR1)
    process.send(signal.SIGUSR1)
    ended = process.wait(30)
    assert ended.code == 128 + signal.SIGUSR1, ended.output
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 4242\n"
    assert run.read_run()["status"] == "preempted"
    assert run.read_run()["attempts"][0]["job"] == "4242"
    assert run.steps()[-1] == run.read_run()["last_step"]
    assert whole.fit("sigusr1").code == 0
    whole.assert_same_result(run)


@pytest.mark.fault("F5", "the same during a probe: the probes behind it wait for the resumed run")
@pytest.mark.parametrize(("every_n_steps", "stops_at"), [(4, 4), (0, 24)])
def test_sigusr1_during_a_probe(
    whole: Whole, tmp_path: Path, slurm: dict[str, str], every_n_steps: int, stops_at: int
) -> None:
    probes = [
        {"class_path": "tests.faults.interrupting.Interrupting", "init_args": {"folder": str(tmp_path)}},
        {"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [1.0]}},
    ]
    groups = {"probing": {"probes": probes}, "checkpoint": {"every_n_steps": every_n_steps}}
    config = write_config(tmp_path / "probing.yaml", groups)
    flags = ["--config", str(config), "--allow_import", "tests"]
    name = f"probed-{every_n_steps}"
    ended = whole.fit(name, *flags, **slurm)
    run = whole.folder(name)
    assert ended.code == 128 + signal.SIGUSR1, ended.output
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 4242\n"
    assert (run.read_run()["status"], run.read_run()["last_step"]) == ("preempted", stops_at)
    assert run.steps() == [stops_at]
    assert [file.name for file in run.probe_folder.iterdir()] == ["interrupting.jsonl"]
    resumed = whole.fit(name, *flags)
    assert resumed.code == 0, resumed.output
    for file in run.probe_folder.iterdir():
        assert [result.step for result in read_results(file)] == run.steps(), f"once each, in {file}"
    assert run.read_run()["status"] == "finished"
    whole.assert_same_result(run)


@pytest.mark.fault("F5", "a signal during the imports is honoured at step 1")
def test_sigusr1_during_the_imports(whole: Whole, tmp_path: Path, slurm: dict[str, str]) -> None:
    line = [sys.executable, "-m", "lightning_em", *whole.words("early")]
    process = subprocess.Popen(line, env={**os.environ, **slurm}, stderr=subprocess.PIPE, text=True)

    def listens() -> bool:
        caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) & 1 << (signal.SIGUSR1 - 1)) or process.poll() is not None

    wait_until(listens, what="the handler")
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "before the heavy imports"
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, said
    assert whole.folder("early").steps() == [1]
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 4242\n"


@pytest.mark.fault("F5", "of two ranks none ends before the job is requeued, and run.json is true by then")
def test_no_rank_ends_before_the_job_is_requeued(case: Case, tmp_path: Path, slurm: dict[str, str]) -> None:
    """`srun --kill-on-bad-exit=1` would kill rank zero after rank one exits, while it runs `scontrol`."""
    run = case.folder("two-requeued")
    known = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "test",
    }
    known |= {"MASTER_PORT": str(free_port()), "RUN_FILE": str(run.run_file)} | slurm
    words = case.words("two-requeued", *TWO_RANKS, *HALF_BATCHES, slow=SLOW)
    first, second = (
        Running(*words, output=tmp_path / f"out-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **known)
        for rank in (0, 1)
    )
    wait_for_checkpoint(run, first)
    for rank in (first, second):
        rank.send(signal.SIGUSR1)
    ended = second.wait(60)
    assert ended.code == 128 + signal.SIGUSR1, ended.output
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 4242\n"
    assert first.wait(30).code == 128 + signal.SIGUSR1
    assert json.loads((tmp_path / "at_requeue").read_text())["status"] == "preempted"
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 4242\n", "once"


@pytest.mark.fault("F8", "SIGINT once: saves and exits 130; twice: ends at once")
def test_sigint_once(whole: Whole) -> None:
    run = whole.folder("sigint")
    process = whole.start("sigint", slow=SLOW)
    wait_for_checkpoint(run, process)
    process.send(signal.SIGINT)
    ended = process.wait(30)
    assert ended.code == 130, ended.output
    assert run.read_run()["status"] == "preempted"
    assert run.steps()[-1] == run.read_run()["last_step"]
    assert whole.fit("sigint").code == 0
    whole.assert_same_result(run)


@pytest.mark.fault("F8", "SIGINT once: saves and exits 130; twice: ends at once")
def test_sigint_twice(whole: Whole) -> None:
    run = whole.folder("sigint-twice")
    process = whole.start("sigint-twice", slow=5.0)
    wait_until(run.run_file.exists, what="run.json")
    wait_until(lambda: "running" in run.run_file.read_text(), what="the first step")
    time.sleep(1.0)  # during the first sleep of 5 s
    process.send(signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive
    start = time.monotonic()
    process.send(signal.SIGINT)
    ended = process.wait(30)
    assert time.monotonic() - start < 2
    assert ended.code == -signal.SIGINT  # 130 in a shell
    assert run.steps() == []
    assert whole.fit("sigint-twice").code == 0
    whole.assert_same_result(run)


def start_two_ranks(case: Case, name: str, folder: Path) -> tuple[subprocess.Popen, int, int]:
    """Start two gloo processes with the real command; return their ids after a published checkpoint."""
    folder.mkdir(parents=True)
    tell = [
        "--trainer.callbacks+=tests.faults.inject.TellPid",
        f"--trainer.callbacks.init_args.folder={folder}",
    ]
    words = case.words(name, *TWO_RANKS, *HALF_BATCHES, slow=SLOW) + tell
    line = [sys.executable, "-m", "lightning_em", *words]
    with (folder / "out").open("w") as output:
        process = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
    run = case.folder(name)
    wait_until(lambda: run.steps() or process.poll() is not None, 120, "a checkpoint of two ranks")
    assert run.steps(), (folder / "out").read_text()
    pids = [int((folder / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert pids[0] == process.pid
    return process, *pids


def exists(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def finish_two_ranks(case: Case, name: str) -> None:
    words = case.words(name, *TWO_RANKS, *HALF_BATCHES)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_em", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.faults
@pytest.mark.fault("F6", "SIGTERM to rank 1 of 2: all ranks save and exit within 30 s")
def test_sigterm_to_rank_1(case: Case, tmp_path: Path) -> None:
    process, _, child = start_two_ranks(case, "rank-1-term", tmp_path / "pids")
    os.kill(child, signal.SIGTERM)
    start = time.monotonic()
    code = process.wait(30)
    wait_until(lambda: not exists(child), 30 - (time.monotonic() - start), "rank 1 to end")
    run = case.folder("rank-1-term")
    assert code == 143, (tmp_path / "pids" / "out").read_text()
    assert run.read_run()["status"] == "preempted"
    assert run.steps()[-1] == run.read_run()["last_step"]
    assert_published_are_valid(run)
    finish_two_ranks(case, "rank-1-term")
    assert run.read_run()["status"] == "finished"


@pytest.mark.faults
@pytest.mark.fault("F7", "kill -9 of one rank: the other exits non-zero within 60 s, no orphan, resume works")
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_is_killed(case: Case, tmp_path: Path, rank: int) -> None:
    name = f"rank-{rank}-killed"
    process, parent, child = start_two_ranks(case, name, tmp_path / "pids")
    os.kill((parent, child)[rank], signal.SIGKILL)
    start = time.monotonic()
    assert process.wait(60) != 0
    wait_until(lambda: not exists(child), 60 - (time.monotonic() - start), "rank 1 to end")
    assert_published_are_valid(case.folder(name))
    finish_two_ranks(case, name)
    assert case.folder(name).read_run()["status"] == "finished"
