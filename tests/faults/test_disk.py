"""F9, F10, F35: disks that are full, too small, read-only or moved."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_em.runs import RunFolder
from tests.faults.conftest import Case, Whole
from tests.faults.processes import assert_published_are_valid, wait_for_checkpoint
from tests.fitting import cut_after


def fill(folder: Path, leave: int) -> Path:
    """Fill the disk except for this many bytes."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return ballast


@pytest.mark.fault(
    "F9", "disk full during a save: nothing half published, path and bytes named, resumes after freeing"
)
@pytest.mark.parametrize("leave", [0, 8192, 16384])
def test_disk_fills_up(whole: Whole, small_disk: Path, leave: int) -> None:
    case = Whole(whole.config, small_disk)
    run = case.folder("full")
    process = case.start("full", slow=0.1)
    process_output = process.output
    wait_for_checkpoint(run, process)
    ballast = fill(small_disk, leave)
    ended = process.wait(60)
    text = process_output.read_text(errors="replace")
    assert ended.code not in (0, None)
    assert_published_are_valid(run)
    assert run.steps() != []
    assert list(run.checkpoints.glob(".incomplete-*")) == []
    ballast.unlink()
    if leave:  # with no space left, writing the metrics or the output may fail first
        assert f"could not write {run.checkpoints}/step-" in text
        assert "bytes" in text
        assert "Traceback" not in text
    done = case.at(small_disk).fit("full")
    assert done.code == 0, done.output
    assert_published_are_valid(run)
    assert run.steps()[-1] == 24
    assert (run.checkpoint(24) / "adapter_model.safetensors").read_bytes() == (
        whole.run.checkpoint(24) / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.fault("F10", "too little disk at the start: refused before step 0 with both figures")
def test_too_little_room(case: Case, small_disk: Path) -> None:
    fill(small_disk, 100_000)
    done = case.at(small_disk).fit("small")
    run = RunFolder(small_disk / "small")
    assert done.code == 2
    assert "the remaining 6 checkpoints need about 2" in done.output
    assert " free. Free some space" in done.output
    assert "Traceback" not in done.output
    assert run.steps() == []
    assert not run.metrics_file.exists()


@pytest.mark.fault("F35", "spaces and non-ASCII in the path, folder moved then resumed, read-only output")
def test_path_with_spaces_and_accents(whole: Whole, tmp_path: Path) -> None:
    root = tmp_path / "mes r\u00e9sultats \u4e2d"
    root.mkdir()
    config = root / "exp\u00e9rience 1.yaml"
    shutil.copy(whole.config, config)
    case = Case(config, root)
    done = case.fit("run \u00fc")
    assert done.code == 0, done.output
    whole.assert_same_result(case.folder("run \u00fc"))


@pytest.mark.fault("F35", "spaces and non-ASCII in the path, folder moved then resumed, read-only output")
def test_moved_folder(whole: Whole, tmp_path: Path) -> None:
    cut = cut_after(whole.run, 12, tmp_path / "elsewhere" / "moved")
    done = whole.at(cut.path.parent).fit("moved")
    assert done.code == 0, done.output
    assert "from step 12" in done.output
    whole.assert_same_result(cut)


@pytest.mark.fault("F35", "spaces and non-ASCII in the path, folder moved then resumed, read-only output")
def test_read_only_output(case: Case, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    read_only = case.at(small_disk).words("new")
    from tests.faults.processes import run as run_command

    done = run_command(*read_only, output=tmp_path / "out")
    assert done.code == 2
    assert "Read-only file system" in done.output
    assert "Traceback" not in done.output
    assert str(small_disk) in done.output
