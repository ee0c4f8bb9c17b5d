"""Strategies that cannot work are refused early, by name."""

import time
from pathlib import Path

import pytest

from lightning_em.launch import named_trainer, num_processes, refuse_strategy, refuse_task_count
from tests.fitting import command

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        ("fsdp", "ShardedBase"),
        ("fsdp_cpu_offload", "ShardedBase"),
        ("deepspeed_stage_2", "ShardedBase"),
        ("lightning.pytorch.strategies.DeepSpeedStrategy", "ShardedBase"),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, "ShardedBase"),
        ({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}, "ShardedBase"),
        ("ddp_spawn", "ddp"),
        ("ddp_notebook_find_unused_parameters_true", "ddp"),
        (
            {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "fork"}},
            "ddp",
        ),
    ],
)
def test_a_strategy_that_cannot_work_is_refused_with_one_that_does(strategy, instead) -> None:
    with pytest.raises(ValueError, match=rf"cannot work here: .* Use trainer\.strategy.*{instead}"):
        refuse_strategy({"strategy": strategy})


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        "single_device",
        None,
        {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "popen"}},
        {"class_path": "lightning_em.strategies.ShardedBase"},
    ],
)
def test_the_others_are_not(strategy) -> None:
    refuse_strategy({"strategy": strategy})


def test_every_trainer_config_that_comes_with_the_package_is_allowed() -> None:
    files = sorted((CONFIGS / "trainer").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        trainer = named_trainer(["--trainer", str(file)])
        assert trainer["accelerator"] in ("cpu", "gpu"), file
        refuse_strategy(trainer)


def test_the_command_line_is_read_as_the_parser_will(tmp_path) -> None:
    (tmp_path / "part.yaml").write_text("strategy: fsdp\ndevices: 4\n")
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("trainer: part.yaml\n")
    words = ["fit", "--config", str(experiment)]
    assert named_trainer(words) == {"strategy": "fsdp", "devices": 4}
    assert named_trainer([*words, "--trainer.strategy=ddp"])["strategy"] == "ddp"
    assert named_trainer([*words, "--trainer.strategy", "ddp"])["strategy"] == "ddp"
    assert named_trainer([*words, "--trainer", str(CONFIGS / "trainer/cpu.yaml")])["devices"] == 1
    experiment.write_text("trainer: {strategy: {class_path: x.DeepSpeedStrategy}}\n")
    with pytest.raises(ValueError, match=r"x\.DeepSpeedStrategy cannot work"):
        refuse_strategy(named_trainer(words))
    assert named_trainer(["fit", "--config", "nowhere.yaml", "--trainer"]) == {}


def test_it_is_refused_within_five_seconds_and_starts_nothing(tmp_path) -> None:
    start = time.monotonic()
    words = ["--config", str(CONFIGS / "experiment/quickstart.yaml"), "--run.root", str(tmp_path)]
    done = command("fit", *words, "--trainer.strategy", "deepspeed")
    assert time.monotonic() - start < 5
    assert done.returncode == 2
    assert "lightning_em.strategies.ShardedBase" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
            "srun has started 2 .* is 1",
        ),
        ({"WORLD_SIZE": "8", "RANK": "3"}, "torchrun has started 8 .* is 1"),
        (
            {"WORLD_SIZE": "8", "RANK": "3", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"},
            "torchrun has started 8 .* is 1",
        ),
    ],
)
def test_another_number_of_processes_is_refused(environment, match) -> None:
    with pytest.raises(ValueError, match=match):
        refuse_task_count({"devices": 1, "num_nodes": 1}, environment)


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"devices": 4, "num_nodes": 2}, 8),
        ({"devices": "4"}, 4),
        ({"devices": [0, 2, 3]}, 3),
        ({"devices": "1,3"}, 2),
        ({"devices": "3,"}, 1),
        ({"devices": "auto"}, None),
        ({"devices": -1}, None),
        ({"devices": "-1", "num_nodes": 2}, None),
    ],
)
def test_number_of_processes_in_every_way_to_write_it(trainer, count) -> None:
    assert num_processes(trainer) == count


def test_a_batch_script_without_srun_is_refused() -> None:
    with pytest.raises(ValueError, match="started once: write `srun lightning-em"):
        refuse_task_count({"devices": 2}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    ("trainer", "environment"),
    [
        ({"devices": 4, "num_nodes": 2}, {"SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1"}),
        ({"devices": "auto", "num_nodes": 1}, {"WORLD_SIZE": "8"}),
        (
            {"devices": 4, "num_nodes": 2},  # srun starts one torchrun a node
            {"WORLD_SIZE": "8", "RANK": "3", "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        ),
        ({"devices": 2}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "bash"}),
        ({"devices": 1}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}),
        ({"devices": 2}, {}),
    ],
)
def test_matching_numbers_are_not(trainer, environment) -> None:
    refuse_task_count(trainer, environment)
