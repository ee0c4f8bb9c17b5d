"""F28: two fits into one folder, and the names of runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_em.lock import LOCK
from tests.faults.conftest import Case, Whole
from tests.faults.processes import run, wait_until

SECOND = "a second fit into a folder in use is refused before the heavy imports, naming the holder"


@pytest.mark.fault("F28", SECOND)
def test_second_fit_is_refused(whole: Whole, tmp_path: Path) -> None:
    folder = whole.folder("shared")
    first = whole.start("shared", slow=0.3)
    wait_until(folder.steps, what="a checkpoint of the first")
    words = whole.words("shared")
    start = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_em", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - start
    assert second.returncode == 2
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in second.stderr
    assert "Traceback" not in second.stderr
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in second.stderr.splitlines() if "import time:" in line
    }
    assert "lightning_em.lock" in imported
    assert not {"torch", "lightning", "transformers"} & imported
    assert seconds < 5
    first.send(signal.SIGKILL)
    first.wait()
    assert (folder.path / LOCK).exists(), "a killed process leaves its lock file"
    assert folder.status() == "killed"
    assert whole.fit("shared").code == 0
    assert not (folder.path / LOCK).exists()
    whole.assert_same_result(folder)


@pytest.mark.fault("F28", SECOND)
def test_holder_on_another_machine(case: Case) -> None:
    """Simulate a file system without locks across machines, where the holder's heartbeat decides."""
    lock = case.folder("far").path / LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text(
        json.dumps({"host": "node17", "pid": 4711, "job": "99", "started": "then"}), encoding="utf-8"
    )
    refused = case.fit("far")
    assert refused.code == 2
    assert "is in use by process 4711 on node17 (Slurm job 99)" in refused.output
    os.utime(lock, (time.time() - 3600,) * 2)
    assert case.fit("far").code == 0


@pytest.mark.fault("F28", "a run's name is experiment + 8 hex of the config without device settings")
def test_name_of_a_run(whole: Whole, tmp_path: Path) -> None:
    def named(*flags: str) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        words = ["fit", "--config", str(whole.config), "--run.root", str(root), "--trainer.max_epochs", "1"]
        done = run(*words, *flags, output=tmp_path / "out")
        assert done.code == 0, done.output
        (folder,) = root.iterdir()
        assert len(folder.name.removeprefix("experiment-")) == 8
        return folder.name

    assert named() == named("--data.num_workers", "1") == named("--trainer.log_every_n_steps", "2")
    assert named() != named("--model.objective.kl_weight", "2")
