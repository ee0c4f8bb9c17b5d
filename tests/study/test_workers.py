"""What each worker of a study gets, and what it makes of trouble."""

import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from torch import distributed

from lightning_em.study import read_study
from lightning_em.study.execution import run_study
from lightning_em.study.work import tidy
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
    trouble = {
        "trainer.callbacks+": "tests.study.trouble.Leave",
        "trainer.callbacks.init_args.code": code,
    }
    text = told_by_a_study(tmp_path, experiment(tiny_model_folder(), chat_file), trouble)
    assert f"failed: general-vector-seed0: SystemExit: {said}" in text
    assert "its worker died" not in text


def test_a_worker_that_has_lost_its_gpu_makes_room_for_another(
    tmp_path, tiny_model_folder, chat_file, monkeypatch
) -> None:
    """Or it would fail every task that is left, one after the other."""
    monkeypatch.setattr("lightning_em.study.workers.START_METHOD", "forkserver")
    trouble = {"trainer.callbacks+": "tests.study.trouble.LoseTheGpu"}
    text = told_by_a_study(tmp_path, experiment(tiny_model_folder(), chat_file), trouble)
    assert "it is continued by another one" in text
    assert "failed: general-vector-seed0: its worker died" in text


def told_by_a_study(folder: Path, settings: dict[str, Any], trouble: dict[str, Any]) -> str:
    """What a study of one run in trouble prints."""
    write_config(folder / "experiment.yaml", settings)
    content = {
        "name": "trouble",
        "experiment": "experiment.yaml",
        "seeds": [0],
        "set": {"allow_import": "tests"} | trouble,
        "adapters": {"vector": {}},
        "arms": {"general": {"role": "general"}},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    output = io.StringIO()
    study = read_study(file, folder / "runs")
    assert run_study(study, workers=1, console=Console(file=output, width=400)) == 1
    return output.getvalue()


class Knot:
    """Refers to itself, as a trainer and its module do."""

    def __init__(self) -> None:
        self.self = self


def test_what_a_task_leaves_behind_is_let_go() -> None:
    knot = Knot()
    seen = weakref.ref(knot)
    del knot
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    tidy()
    assert seen() is None
    assert not distributed.is_initialized(), "the next run has ranks of its own"
