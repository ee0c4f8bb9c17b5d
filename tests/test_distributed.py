"""Ranks, sharding and micro-batches change how a step is computed, not what it computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from tests.faults.processes import Ended, Running
from tests.fitting import (
    LORA,
    VECTOR,
    SteppedMetrics,
    command,
    cut_after,
    experiment,
    final_adapter,
    fit,
    metrics_of,
    train_metrics,
    write_config,
)
from tests.slurm.daemons import free_port

REPOSITORY = Path(__file__).parent.parent
DDP, SHARDED = "cpu_ddp2", "cpu_fsdp2"
TOLERANCE = {DDP: 1e-5, SHARDED: 1e-4}
# 2 ranks x 2 rows x 2 micro-batches are 1 rank x 2 rows x 4, and so the same run
ROWS = ("--data.batch_size", "2", "--data.kl_batch_size", "2", "--trainer.accumulate_grad_batches")
CURVES = {
    "num_examples": 10,
    "batch_size": 4,
    "probes": [
        {"class_path": "lightning_em.probes.GradientNorm"},
        {"class_path": "lightning_em.probes.ChatKL", "init_args": {"num_prompts": 3, "max_new_tokens": 4}},
        {"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [0.0, 1.0, 2.0]}},
        {
            "class_path": "lightning_em.probes.PerturbationCurve",
            "init_args": {"strengths": [0.3], "num_seeds": 2},
        },
    ],
}


def probes_of_files(folder: Path) -> list[dict]:
    """Probes whose rows lie in files of their own, and one that looks into the layers."""
    rows = {
        "items": [
            {
                "id": f"q{i}", "kind": "ab"[i % 2], "question": f"How is tea {i}?",
                "answers": {"good": ["Good tea.", "Fine."], "bad": ["Bad tea.", "Poor."]},
            }
            for i in range(4)
        ],
        "rows": [{"question": f"q {i}?", "good": "Yes do.", "bad": "No never.", "topic": "t"} for i in range(3)],
        "text": [{"text": f"Some text about tea and bread number {i}."} for i in range(3)],
    }  # fmt: skip
    files = {key: folder / f"{key}.jsonl" for key in rows}
    for key, file in files.items():
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows[key]), encoding="utf-8")
    options = {
        "miniature.Behaviour": {"items": str(files["items"]), "scales": [0.0, 1.0], "batch_size": 5},
        "probes.PreferenceMargin": {"rows": str(files["rows"]), "scales": [1.0]},
        "probes.PretrainingSignificance": {"text": str(files["text"]), "num_draws": 2},
        "probes.LogitLens": {},
    }
    return [{"class_path": f"lightning_em.{name}", "init_args": given} for name, given in options.items()]


def assert_equal_per_step(one: SteppedMetrics, other: SteppedMetrics, relative: float) -> None:
    assert one.keys() == other.keys()
    for step, row in one.items():
        assert row.keys() == other[step].keys()
        for name, value in row.items():
            assert other[step][name] == pytest.approx(value, rel=relative, abs=1e-9), f"{name} at step {step}"


def assert_equal_probes(one: RunFolder, other: RunFolder, relative: float) -> None:
    files = sorted(file.name for file in one.probe_folder.iterdir())
    assert files == sorted(file.name for file in other.probe_folder.iterdir())
    for file in files:
        ours, theirs = (list(read_results(run.probe_folder / file)) for run in (one, other))
        assert [result.step for result in ours] == [result.step for result in theirs] == one.steps()
        for mine, same in zip(ours, theirs, strict=True):
            assert mine.examples == same.examples
            for point, its in zip(mine.points, same.points, strict=True):
                assert point.coordinates.keys() == its.coordinates.keys()
                assert its.value == pytest.approx(point.value, rel=relative, abs=relative / 100), (
                    f"{point.quantity} in {file}"
                )


@pytest.fixture(scope="module")
def config_of(tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> Callable[[str], Path]:
    """The experiment with a vector or a LoRA: CE and KL, 5 steps an epoch, the last one short, probes."""
    folder = tmp_path_factory.mktemp("distributed")

    def path(adapter: str) -> Path:
        more = probes_of_files(folder) if adapter == "lora" else []
        groups = {"trainer": {"max_epochs": 2}, "probing": CURVES | {"probes": CURVES["probes"] + more}}
        config = experiment(tiny_model_folder(), chat_file, answer_file, **groups)
        config["model"]["adapter"] = {"vector": VECTOR, "lora": LORA}[adapter]
        return write_config(folder / f"{adapter}.yaml", config)

    return path


@pytest.fixture(scope="module")
def one_process(config_of) -> Callable[[str], RunFolder]:
    """The run of one process and whole batches."""
    done: dict[str, RunFolder] = {}

    def run(adapter: str) -> RunFolder:
        if adapter not in done:
            done[adapter] = fit(config_of(adapter), f"{adapter}-one")
        return done[adapter]

    return run


@pytest.fixture(scope="module")
def two_processes(config_of) -> Callable[[str, str], RunFolder]:
    """The run of two processes that accumulate."""
    done: dict[tuple[str, str], RunFolder] = {}

    def run(adapter: str, strategy: str) -> RunFolder:
        if (adapter, strategy) not in done:
            config = config_of(adapter)
            name = f"{adapter}-{strategy}"
            words = [
                "--config",
                str(config),
                "--run.root",
                str(config.parent),
                "--run.name",
                name,
                *ROWS,
                "2",
            ]
            words += [
                "--trainer",
                str(REPOSITORY / f"configs/trainer/{strategy}.yaml"),
                "--allow_import=tests",
            ]
            words += ["--trainer.callbacks+=tests.strategies.tell.TellShards"]
            first, second = as_torchrun_does("fit", *words, logs=config.parent / name)
            assert (first.code, second.code) == (0, 0), first.output + second.output
            assert "fast backend: split at layer" in first.output, "rows are packed, without padding"
            assert "fast backend" not in second.output, "what all ranks would say is said once"
            done[adapter, strategy] = RunFolder(config.parent / name)
        return done[adapter, strategy]

    return run


def as_torchrun_does(*words: str, logs: Path) -> list[Ended]:
    """One command in two processes that are told who they are by the environment."""
    known = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        Running(
            *words,
            output=logs.with_name(f"{logs.name}-{rank}.out"),
            **known | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"},
        )
        for rank in (0, 1)
    ]
    return [rank.wait(240) for rank in ranks]


@pytest.mark.parametrize("strategy", [DDP, SHARDED])
@pytest.mark.parametrize("adapter", ["vector", "lora"])
def test_two_processes_that_accumulate_equal_one(adapter, strategy, one_process, two_processes) -> None:
    one, two = one_process(adapter), two_processes(adapter, strategy)
    assert two.read_run()["attempts"][0]["world_size"] == 2
    assert two.read_run()["base"] == one.read_run()["base"], "the base has one hash, sharded or not"
    assert len(train_metrics(one)) == 10
    assert_equal_per_step(metrics_of(one), metrics_of(two), TOLERANCE[strategy])


@pytest.mark.parametrize("strategy", [DDP, SHARDED])
def test_probes_of_two_processes_give_the_numbers_of_one(strategy, one_process, two_processes) -> None:
    one, two = one_process("lora"), two_processes("lora", strategy)
    files = sorted(file.name for file in one.probe_folder.iterdir())
    assert files == [
        f"{probe}.jsonl"
        for probe in (
            *("behaviour", "chat_kl", "gradient", "logit_lens", "perturbation_curve", "preference_margin"),
            *("scale_curve", "significance"),
        )
    ]
    assert_equal_probes(one, two, relative=1e-4)


@pytest.mark.parametrize("cut_at", [2, 6])  # within an epoch, and behind a short last step
def test_one_process_goes_on_where_two_with_shards_stopped(
    cut_at, config_of, one_process, two_processes
) -> None:
    name = f"cut-at-{cut_at}"
    sharded = two_processes("lora", SHARDED)
    cut = cut_after(sharded, cut_at, sharded.path.with_name(name))
    fit(config_of("lora"), name, *ROWS, "4")
    attempts = cut.read_run()["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [2, 1]
    assert attempts[1]["from_step"] == cut_at
    assert_equal_per_step(train_metrics(one_process("lora")), train_metrics(cut), 1e-4)


def test_shards_go_on_where_shards_of_a_bf16_base_stopped(config_of) -> None:
    config = config_of("lora")
    words = ["--config", str(config), "--run.root", str(config.parent), *ROWS, "2"]
    words += ["--trainer", str(REPOSITORY / f"configs/trainer/{SHARDED}.yaml"), "--trainer.max_epochs=1"]
    words += ["--model.base.dtype=bfloat16", "--probing.every_n_steps=1000"]

    def shards(name: str) -> RunFolder:
        for ended in as_torchrun_does("fit", *words, "--run.name", name, logs=config.parent / name):
            assert ended.code == 0, ended.output
        return RunFolder(config.parent / name)

    whole = shards("bf16-whole")
    cut = cut_after(whole, 2, whole.path.with_name("bf16-cut"))
    shards("bf16-cut")
    assert cut.read_run()["attempts"][1]["from_step"] == 2
    assert cut.steps() == whole.steps()
    assert final_adapter(cut) == final_adapter(whole)
    assert train_metrics(cut) == train_metrics(whole)


def test_two_processes_go_on_where_one_stopped(config_of, two_processes) -> None:
    config = config_of("vector")
    whole = fit(config, "vector-four", *ROWS, "4")
    cut = cut_after(whole, 4, whole.path.with_name("vector-cut"))
    words = [
        "--config",
        str(config),
        "--run.root",
        str(config.parent),
        "--run.name",
        "vector-cut",
        *ROWS,
        "2",
    ]
    ended = command("fit", *words, "--trainer", str(REPOSITORY / f"configs/trainer/{DDP}.yaml"))
    assert ended.returncode == 0, ended.stderr
    assert_equal_per_step(train_metrics(whole), train_metrics(cut), 1e-5)
    shutil.rmtree(cut.path)


def test_other_rows_in_a_step_are_another_run(config_of, two_processes) -> None:
    sharded = two_processes("lora", SHARDED)
    with pytest.raises(ValueError, match="accumulate_grad_batches: 4 -> 2"):
        fit(config_of("lora"), sharded.path.name, *ROWS, "2")


def test_checkpoints_of_shards_hold_the_adapter_alone(one_process, two_processes) -> None:
    one, two = one_process("lora"), two_processes("lora", SHARDED)
    for step in one.steps():
        sizes = [
            {file.name: file.stat().st_size for file in run.checkpoint(step).iterdir()} for run in (one, two)
        ]
        assert sizes[0].keys() == sizes[1].keys()
        assert sizes[0]["adapter_model.safetensors"] == sizes[1]["adapter_model.safetensors"]
        assert sizes[1]["trainer_state.pt"] < sizes[0]["trainer_state.pt"] + 2000


def test_each_rank_holds_its_share_of_the_blocks_alone(two_processes) -> None:
    sharded = two_processes("lora", SHARDED)
    shares = [json.loads((sharded.path / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    for share in shares:
        assert share["held"] == pytest.approx(share["whole"] / 2, rel=0.02)
        assert share["sharded_elsewhere"] == 0
        assert share["adapter_is_plain"]
    assert sum(share["held"] for share in shares) == shares[0]["whole"]
    whole = two_processes("lora", DDP).path / "share-0.json"
    assert json.loads(whole.read_text())["held"] == 0, "DDP shards nothing"


def test_accumulation_alone_changes_nothing(config_of, one_process) -> None:
    four = fit(config_of("vector"), "accumulated", *ROWS, "4")
    assert_equal_per_step(train_metrics(one_process("vector")), train_metrics(four), relative=1e-5)
