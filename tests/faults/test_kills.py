"""F1, F2, F3, F11: killed at any time and continued with the same command, a run gives the same result."""

import contextlib
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from lightning_em.records import read_lines
from lightning_em.runs import RunFolder
from tests.faults.conftest import STEPS, Whole
from tests.faults.processes import assert_published_are_valid, wait_for_checkpoint, wait_until
from tests.fitting import cut_after

NUM_KILLS = 20
SLOW = 0.03


def last_step(run: RunFolder) -> int:
    """Return the step of the last line of the metrics; 0 if there is none."""
    lines = list(read_lines(run.metrics_file))
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def kill_once_and_finish(whole: Whole, name: str, step: int, delay: float, **environment: str) -> bool:
    """Kill `delay` seconds after a step and after at least one published checkpoint; then run the same command.

    Returns:
        Whether there was anything left to kill: a run that ended first is no trial.
    """
    run = whole.folder(name)
    process = whole.start(name, slow=SLOW, **environment)
    wait_for_checkpoint(run, process)
    wait_until(lambda: last_step(run) >= step or not process.is_alive, what=f"step {step}")
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        process.send(signal.SIGKILL)
    if process.wait().code == 0:
        return False
    assert process.wait().code == -signal.SIGKILL
    assert run.status() in ("killed", "finished")  # the kill may come after the run has finished
    assert_published_are_valid(run)
    again = whole.fit(name, **environment)
    assert again.code == 0, again.output
    assert run.read_run()["status"] == "finished"
    assert_published_are_valid(run)
    assert list(run.path.rglob(".incomplete-*")) == []
    whole.assert_same_result(run)
    return True


def kill_at_random_times(whole: Whole, name: str, seed: int, **environment: str) -> None:
    """Real kills, spread over the whole run."""
    draw = random.Random(seed)
    killed = 0
    for trial in range(2 * NUM_KILLS):
        step, delay = draw.randint(4, STEPS), draw.uniform(0, 2 * SLOW)
        killed += kill_once_and_finish(whole, f"{name}-{trial}", step, delay, **environment)
        if killed == NUM_KILLS:
            return
    pytest.fail(f"only {killed} of {2 * NUM_KILLS} runs were still there to be killed")


@pytest.mark.fault(
    "F1", f"kill -9 at a random time x {NUM_KILLS}: all finish with the same result, no invalid checkpoint"
)
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kill_at_a_random_time(whole: Whole) -> None:
    kill_at_random_times(whole, "killed", seed=1)


@pytest.mark.fault(
    "F1", "kill -9 at the first checkpoint and in the middle: both finish with the same result"
)
def test_kill_at_the_first_checkpoint_and_later(whole: Whole) -> None:
    assert kill_once_and_finish(whole, "killed-first", step=4, delay=0.0)
    assert kill_once_and_finish(whole, "killed-later", step=13, delay=SLOW / 2)


@pytest.mark.fault("F2", f"F1 x {NUM_KILLS} with $TMPDIR on another file system, left empty")
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_temporary_folder_on_another_file_system(whole: Whole, small_disk: Path) -> None:
    assert small_disk.stat().st_dev != whole.root.stat().st_dev
    kill_at_random_times(whole, "elsewhere", seed=2, TMPDIR=str(small_disk))
    assert list(small_disk.iterdir()) == []


@pytest.mark.fault(
    "F3", "resumed from each of 23 steps: remaining batch ids and result identical at every one"
)
@pytest.mark.faults
@pytest.mark.timeout(600)
def test_resume_from_every_step(whole: Whole, tmp_path: Path) -> None:
    every_step = ("--checkpoint.every_n_steps", "1")

    def recorded(name: str) -> list[list]:
        target = tmp_path / f"{name}.jsonl"
        record = ["--allow_import", "tests", "--trainer.callbacks+=tests.faults.inject.RecordRows"]
        done = whole.fit(name, *every_step, *record, f"--trainer.callbacks.init_args.path={target}")
        assert done.code == 0, done.output
        return [json.loads(line) for line in target.read_text().splitlines()]

    reference = recorded("every-step")
    assert [row[0] for row in reference] == list(range(STEPS))
    for step in range(1, STEPS):
        cut = cut_after(whole.folder("every-step"), step, whole.root / f"from-{step}")
        assert recorded(cut.path.name) == reference[step:], f"resumed from step {step}"
        whole.assert_same_result(cut)


@pytest.mark.fault("F11", "newest checkpoint truncated: falls back to the newest valid one and says so")
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "trainer_state.pt", "MANIFEST.json"])
def test_truncated_newest_checkpoint(whole: Whole, file: str) -> None:
    cut = cut_after(whole.run, 12, whole.root / f"truncated-{file}")
    broken = cut.checkpoint(12) / file
    broken.write_bytes(broken.read_bytes()[:-7])
    done = whole.fit(cut.path.name)
    assert done.code == 0, done.output
    assert "checkpoint step 12 is corrupt and skipped" in done.output
    assert "from step 8" in done.output
    whole.assert_same_result(cut)


@pytest.mark.fault("F11", "newest checkpoint truncated: falls back to the newest valid one and says so")
def test_no_checkpoint_left(whole: Whole) -> None:
    cut = cut_after(whole.run, 4, whole.root / "none-left")
    shutil.rmtree(cut.checkpoint(4))
    done = whole.fit("none-left")
    assert done.code == 0, done.output
    whole.assert_same_result(cut)
