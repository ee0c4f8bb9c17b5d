"""F1, F2, F3, F11: killed anywhere, continued by the same command, with the same result."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import STEPS, Whole, cut_after
from tests.faults.processes import assert_published_are_valid, wait_for_checkpoint

NUM_KILLS = 20
SLOW = 0.03


def kill_once_and_finish(whole: Whole, name: str, delay: float, **environment: str) -> None:
    """Kill after at least one published step and `delay` more seconds, then give the same command again."""
    run = whole.folder(name)
    process = whole.start(name, slow=SLOW, **environment)
    wait_for_checkpoint(run, process)
    time.sleep(delay)
    process.send(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert run.status() in ("killed", "finished")  # the last instant counts too
    assert_published_are_valid(run)
    again = whole.fit(name, **environment)
    assert again.code == 0, again.output
    assert run.read_run()["status"] == "finished"
    assert_published_are_valid(run)
    assert list(run.path.rglob(".incomplete-*")) == []
    whole.assert_same_result(run)


def time_from_first_checkpoint_to_end(whole: Whole, name: str) -> float:
    process = whole.start(name, slow=SLOW)
    wait_for_checkpoint(whole.folder(name), process)
    start = time.monotonic()
    assert process.wait().code == 0
    return time.monotonic() - start


@pytest.mark.fault(
    "F1", f"kill -9 at a random time x {NUM_KILLS}: all finish with the same result, no invalid checkpoint"
)
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kill_at_a_random_time(whole: Whole) -> None:
    span = time_from_first_checkpoint_to_end(whole, "timed")
    delays = random.Random(1)
    for number in range(NUM_KILLS):
        kill_once_and_finish(whole, f"killed-{number}", delays.uniform(0, 0.85 * span))


@pytest.mark.fault("F1", "kill -9 at the first checkpoint and .3 s later: both finish with the same result")
def test_kill_at_the_first_checkpoint_and_later(whole: Whole) -> None:
    for number, delay in enumerate((0.0, 0.3)):
        kill_once_and_finish(whole, f"killed-fast-{number}", delay)


@pytest.mark.fault("F2", f"F1 x {NUM_KILLS} with $TMPDIR on another file system, left empty")
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_temporary_folder_on_another_file_system(whole: Whole, small_disk: Path) -> None:
    assert small_disk.stat().st_dev != whole.root.stat().st_dev
    span = time_from_first_checkpoint_to_end(whole, "timed-2")
    delays = random.Random(2)
    for number in range(NUM_KILLS):
        delay = delays.uniform(0, 0.85 * span)
        kill_once_and_finish(whole, f"elsewhere-{number}", delay, TMPDIR=str(small_disk))
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
    assert "checkpoint step 12 is broken and passed over" in done.output
    assert "from step 8" in done.output
    whole.assert_same_result(cut)


@pytest.mark.fault("F11", "newest checkpoint truncated: falls back to the newest valid one and says so")
def test_no_checkpoint_left(whole: Whole) -> None:
    cut = cut_after(whole.run, 4, whole.root / "none-left")
    shutil.rmtree(cut.checkpoint(4))
    done = whole.fit("none-left")
    assert done.code == 0, done.output
    whole.assert_same_result(cut)
