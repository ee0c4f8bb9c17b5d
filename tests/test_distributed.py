"""Ranks and micro-batches change how a step is computed, not what it computes."""

import pytest

from lightning_em.runs import RunFolder
from tests.fitting import LORA, VECTOR, SteppedMetrics, command, experiment, fit, train_metrics, write_config


def assert_equal_per_step(one: SteppedMetrics, other: SteppedMetrics, relative: float) -> None:
    assert one.keys() == other.keys()
    for step, row in one.items():
        assert row.keys() == other[step].keys()
        for name, value in row.items():
            assert other[step][name] == pytest.approx(value, rel=relative, abs=1e-9), f"{name} at step {step}"


@pytest.mark.parametrize("adapter", ["vector", "lora"])
def test_two_processes_and_accumulation_4_equal_one_process(
    adapter, tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 2})
    config["model"]["adapter"] = {"vector": VECTOR, "lora": LORA}[adapter]
    path = write_config(tmp_path / "experiment.yaml", config)
    one = fit(path, "one")
    flags = ["--data.batch_size", "1", "--data.kl_batch_size", "1", "--trainer.accumulate_grad_batches", "4"]
    two_ranks = ["--trainer", "configs/trainer/cpu_ddp2.yaml"]
    words = [
        "fit",
        "--config",
        str(path),
        "--run.root",
        str(tmp_path),
        "--run.name",
        "two",
        *flags,
        *two_ranks,
    ]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    two = RunFolder(tmp_path / "two")
    assert two.read_run()["attempts"][0]["world_size"] == 2
    assert_equal_per_step(train_metrics(one), train_metrics(two), relative=1e-5)


def test_accumulation_alone_changes_nothing(tmp_path, tiny_model_folder, chat_file, answer_file) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 2})
    path = write_config(tmp_path / "experiment.yaml", config)
    one = fit(path, "one")
    flags = ["--data.batch_size", "2", "--data.kl_batch_size", "2", "--trainer.accumulate_grad_batches", "4"]
    four = fit(path, "four", *flags)
    assert_equal_per_step(train_metrics(one), train_metrics(four), relative=1e-5)
