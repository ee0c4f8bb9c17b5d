"""Strategies that cannot work are refused early, by name."""

import time
from pathlib import Path

import pytest

from lightning_em.preflight import (
    num_processes,
    refuse_devices,
    refuse_missing_gpu,
    refuse_precision,
    refuse_settings,
    refuse_strategy,
    refuse_task_count,
    run_path,
    settings_of,
)
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
        trainer = settings_of(["--trainer", str(file)], "trainer")
        assert trainer["accelerator"] in ("cpu", "gpu"), file
        refuse_settings(trainer)


@pytest.mark.parametrize("devices", ["auto", -1, "-1"])
def test_as_many_devices_as_there_are_is_no_number(devices) -> None:
    with pytest.raises(
        ValueError, match=rf"trainer\.devices {devices} .* write the number, and .*accumulate_grad"
    ):
        refuse_devices({"devices": devices})


@pytest.mark.parametrize(
    "strategy", ["single_device", {"class_path": "lightning.pytorch.strategies.SingleDeviceStrategy"}]
)
def test_a_strategy_of_one_device_is_refused_two(strategy) -> None:
    with pytest.raises(
        ValueError, match=r"uses one device, but .* is 2: set them to 1, or use trainer\.strategy=ddp"
    ):
        refuse_devices({"strategy": strategy, "devices": 2})
    refuse_devices({"strategy": strategy, "devices": 1})


@pytest.mark.parametrize(
    "trainer", [{}, {"devices": [0, 1]}, {"devices": 4, "strategy": "ddp", "num_nodes": 2}]
)
def test_other_numbers_of_devices_are_not(trainer) -> None:
    refuse_devices(trainer)


@pytest.mark.parametrize(
    ("precision", "reason", "dtype"),
    [
        ("bf16-true", "casts the adapter", "bfloat16"),
        ("16-true", "casts the adapter", "float16"),
        ("64-true", "casts the adapter", "float64"),
        (64, "casts the adapter", "float64"),
        ("bf16-mixed", "autocast", "bfloat16"),
        ("16-mixed", "autocast", "float16"),
        (16, "autocast", "float16"),  # short for -mixed
        ("bf16", "autocast", "bfloat16"),
        ("transformer-engine", "casts the adapter", "bfloat16"),
    ],
)
def test_a_precision_of_lightnings_is_refused_for_the_bases_own(precision, reason, dtype) -> None:
    match = rf"trainer\.precision {precision} cannot work here: .*{reason}.* Set model\.base\.dtype: {dtype} and leave"
    for refuse in (refuse_precision, refuse_settings):
        with pytest.raises(ValueError, match=match):
            refuse({"precision": precision})


@pytest.mark.parametrize("trainer", [{}, *({"precision": each} for each in (None, 32, "32", "32-true"))])
def test_float32_is_not(trainer) -> None:
    refuse_settings(trainer)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_here_is_refused_with_its_place(tmp_path, accelerator) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(f"devices: 1\naccelerator: {accelerator}\n")
    for words, place in (
        (["--trainer", str(file)], rf" \({file}:2\)"),
        ([f"--trainer.accelerator={accelerator}"], ""),
    ):
        match = rf"trainer\.accelerator is {accelerator}{place}, but there is no GPU here; set --trainer"
        with pytest.raises(ValueError, match=match):
            refuse_missing_gpu(settings_of(words, "trainer"), words, tmp_path)
    refuse_missing_gpu({"accelerator": "cpu"}, [], tmp_path)
    refuse_missing_gpu({}, [], tmp_path)
    (tmp_path / "nvidia0").touch()
    refuse_missing_gpu({"accelerator": accelerator}, [], tmp_path)


@pytest.mark.parametrize("chosen", ["auto", "gpu", "mps", None])
def test_apples_gpu_is_refused(chosen, monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(ValueError, match=r"means Apple's GPU, .* Use --trainer\.accelerator cpu"):
        refuse_settings({"accelerator": chosen})
    refuse_settings({"accelerator": "cpu"})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if chosen != "mps":
        refuse_settings({"accelerator": chosen})


def test_an_accelerator_and_a_logger_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"trainer\.accelerator tpu cannot work here"):
        refuse_settings({"accelerator": "tpu"})
    with pytest.raises(ValueError, match=r"trainer\.logger true names no logger"):
        refuse_settings({"logger": True})
    refuse_settings({"logger": False, "accelerator": "auto"})


def test_the_command_line_is_read_as_the_parser_will(tmp_path) -> None:
    (tmp_path / "part.yaml").write_text("strategy: fsdp\ndevices: 4\n")
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("trainer: part.yaml\n")
    words = ["fit", "--config", str(experiment)]
    assert settings_of(words, "trainer") == {"strategy": "fsdp", "devices": 4}
    assert settings_of([*words, "--trainer.strategy=ddp"], "trainer")["strategy"] == "ddp"
    assert settings_of([*words, "--trainer.strategy", "ddp"], "trainer")["strategy"] == "ddp"
    assert settings_of([*words, "--trainer", str(CONFIGS / "trainer/cpu.yaml")], "trainer")["devices"] == 1
    experiment.write_text("trainer: {strategy: {class_path: x.DeepSpeedStrategy}}\n")
    with pytest.raises(ValueError, match=r"x\.DeepSpeedStrategy cannot work"):
        refuse_strategy(settings_of(words, "trainer"))
    assert settings_of(["fit", "--config", "nowhere.yaml", "--trainer"], "trainer") == {}
    written = {"4": 4, "[0, 1]": [0, 1], "0,1": "0,1", "auto": "auto", "-1": -1}
    for text, devices in written.items():
        assert settings_of([f"--trainer.devices={text}"], "trainer")["devices"] == devices


@pytest.mark.parametrize(
    ("verb", "flags", "answer"),
    [  # each setting by `fit`, each subcommand with one of them: all share the check
        ("fit", ["--trainer.strategy", "deepspeed"], "lightning_em.strategies.ShardedBase"),
        ("fit", ["--trainer.devices", "auto"], "write the number"),
        ("fit", ["--trainer.precision", "bf16-true"], "Set model.base.dtype: bfloat16"),
        ("validate", ["--trainer.strategy", "deepspeed"], "lightning_em.strategies.ShardedBase"),
        ("test", ["--trainer.devices", "auto"], "write the number"),
        ("predict", ["--trainer.precision", "bf16-true"], "Set model.base.dtype: bfloat16"),
    ],
)
def test_it_is_refused_within_five_seconds_and_starts_nothing(tmp_path, verb, flags, answer) -> None:
    start = time.monotonic()
    words = ["--config", str(CONFIGS / "experiment/quickstart.yaml"), "--run.root", str(tmp_path)]
    done = command(verb, *words, *flags)
    assert time.monotonic() - start < 5
    assert done.returncode == 2
    assert answer in done.stderr
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


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--run.name", "x"], "runs/x"),
        (["--run.name=x", "--run.root", "/tmp/y"], "/tmp/y/x"),
        (["--config", "CONFIG"], "elsewhere/named"),
        (["--config=CONFIG", "--run.name", "x"], "elsewhere/x"),
        (["--config", "/nope.yaml"], None),
        ([], None),
    ],
)
def test_the_folder_is_known_where_words_or_configs_name_it(tmp_path, words, folder) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {name: named, root: elsewhere}\n")
    found = run_path([word.replace("CONFIG", str(config)) for word in words])
    assert found == (None if folder is None else Path(folder))
