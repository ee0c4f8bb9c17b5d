"""What each worker of a study gets, and what it makes of trouble."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lightning_em.study import read_study
from lightning_em.study.execution import run_study
from lightning_em.study.workers import environments, visible_gpus
from tests.fitting import experiment, write_config

GPU, CPU = ("--trainer.accelerator=gpu",), ("--trainer.accelerator=cpu",)


def seen(workers: int, runs, gpus: str) -> list[str]:
    found = environments(workers, runs, {"HOME": "/x", "CUDA_VISIBLE_DEVICES": gpus})
    assert all(each["HOME"] == "/x" for each in found)
    return [each["CUDA_VISIBLE_DEVICES"] for each in found]


def test_each_worker_has_a_gpu_of_its_own() -> None:
    assert seen(3, [GPU], "4,GPU-5a,6,7") == ["4", "GPU-5a", "6"]
    assert seen(2, [(*GPU, "--trainer.devices=2")], "0,1,2,3") == ["0,1", "2,3"]
    assert seen(2, [()], "0,1") == ["0", "1"], (
        "a run that names no accelerator takes a GPU where there is one"
    )


def test_one_worker_has_them_all() -> None:
    assert seen(1, [GPU], "0,1") == ["0,1"]


def test_runs_on_the_cpu_may_be_more_than_gpus() -> None:
    assert seen(3, [CPU], "0,1") == ["0", "1", "0"]


def test_without_gpus_nothing_changes() -> None:
    assert environments(2, [GPU], {"CUDA_VISIBLE_DEVICES": ""}) == [{"CUDA_VISIBLE_DEVICES": ""}] * 2


@pytest.mark.parametrize(
    ("workers", "run", "message"),
    [
        (
            3,
            GPU,
            r"--workers 3 needs 3 GPUs, .* and there are 2: give --workers 2, or set trainer.accelerator",
        ),
        (2, (*GPU, "--trainer.devices=2"), r"needs 4 GPUs, as its runs ask for 2 each .*: give --workers 1"),
        (2, (*GPU, "--trainer.devices=4"), r"needs 8 GPUs, .* and there are 2: ask for fewer"),
    ],
)
def test_more_workers_than_gpus_are_refused(workers, run, message) -> None:
    with pytest.raises(ValueError, match=message):
        seen(workers, [CPU, run], "0,1")


def test_gpus_are_those_of_the_variable_else_of_the_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lightning_em.study.workers.DEVICES", tmp_path)
    assert visible_gpus({}) == []
    for name in ("nvidia2", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}) == ["0", "1"], "CUDA counts those it sees from 0"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5"}) == ["5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


@pytest.mark.parametrize(
    ("code", "said"), [("enough", "enough"), (0, "exit code 0"), (None, "exit code 0"), (3, "exit code 3")]
)
def test_a_task_that_exits_fails_once_with_what_it_says(
    code, said, tmp_path, tiny_model_folder, chat_file, monkeypatch
) -> None:
    monkeypatch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")
    write_config(tmp_path / "experiment.yaml", experiment(tiny_model_folder(), chat_file))
    leaving = {"allow_import": "tests", "trainer.callbacks+": "tests.study.trouble.Leave"}
    content = {
        "name": "leaving",
        "experiment": "experiment.yaml",
        "seeds": [0],
        "set": leaving | {"trainer.callbacks.init_args.code": code},
        "adapters": {"vector": {}},
        "arms": {"general": {"role": "general"}},
    }
    file = Path(tmp_path / "study.yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    output = io.StringIO()
    assert (
        run_study(read_study(file, tmp_path / "runs"), workers=1, console=Console(file=output, width=400))
        == 1
    )
    text = output.getvalue()
    assert f"failed: general-vector-seed0: SystemExit: {said}" in text
    assert "its worker died" not in text
