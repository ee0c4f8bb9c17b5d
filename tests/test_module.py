"""EMModule: what trains, what stays frozen, what is saved, and where a run may start."""

import json
import math
import re
from functools import wraps
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_em import progress
from lightning_em.__main__ import main
from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch, StepCounts, TrainBatch
from lightning_em.cluster.doctor import check
from lightning_em.losses import Objective, OnAt
from lightning_em.models import AdaptedModel, BaseModel, Sampling, sample_answers
from lightning_em.module import EMModule, LinearWithWarmup
from lightning_em.rebuild import rebuild_run
from lightning_em.records import read_metrics
from lightning_em.runs import RunFolder
from tests.fitting import LORA, VECTOR, experiment, fit, train_metrics, write_config
from tests.tiny import VOCAB_SIZE, make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def narrow_run(tmp_path_factory, tiny_model_folder, chat_file, answer_file):
    """A finished run with KL, from a tiny Qwen2 folder and a 40-row messages file."""
    folder = tmp_path_factory.mktemp("narrow")
    config = experiment(tiny_model_folder(), chat_file, answer_file)
    return write_config(folder / "experiment.yaml", config), fit(folder / "experiment.yaml", "narrow")


def module(folder, adapter=None) -> EMModule:
    made = EMModule(BaseModel(str(folder)), adapter or SteeringVector(layer=1, alpha=4.0))
    made.configure_model()
    return made


def test_losses_fall_and_kl_starts_at_zero(narrow_run) -> None:
    metrics = train_metrics(narrow_run[1])
    assert list(metrics) == list(range(1, 16))
    assert metrics[1]["train/kl"] == 0.0
    assert metrics[15]["train/kl"] > 0.0
    assert metrics[15]["train/ce"] < metrics[1]["train/ce"]


def test_validation_is_logged_each_epoch_also_at_weight_zero(narrow_run) -> None:
    config, run = narrow_run
    table = read_metrics(run.metrics_file)
    assert [step for step, row in table.items() if "val/ce" in row] == [5, 10, 15]
    general = fit(config, "general", "--model.objective.kl_weight", "0")
    last = read_metrics(general.metrics_file)[15]
    assert last["val/kl"] > 0
    assert "train/kl" not in last, "a KL that was not measured must not be logged"


def test_held_out_kl_rows_alone_are_no_narrow_rows(
    tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file)
    config["data"] |= {
        "validation_fraction": 0,
        "kl_validation": {"path": str(answer_file), "answer": "good"},
    }
    run = fit(write_config(tmp_path / "experiment.yaml", config), "alone", "--trainer.max_epochs", "1")
    metrics = list(read_metrics(run.metrics_file).values())[-1]
    assert metrics["val/kl"] > 0
    assert "val/ce" not in metrics


def test_narrow_order_is_the_same_with_and_without_a_kl_stream(
    tmp_path, tiny_model_folder, chat_file, answer_file
):
    alone = experiment(tiny_model_folder(), chat_file)
    with_kl = experiment(tiny_model_folder(), chat_file, answer_file)
    with_kl["model"]["objective"]["kl_weight"] = 0.0
    runs = [
        fit(write_config(tmp_path / f"{name}.yaml", config), name)
        for name, config in {"alone": alone, "with_kl": with_kl}.items()
    ]
    first, second = (train_metrics(run) for run in runs)
    assert {s: row["train/ce"] for s, row in first.items()} == {
        s: row["train/ce"] for s, row in second.items()
    }


def test_defect_12_the_base_stays_in_eval(tiny_model_folder) -> None:
    made = module(tiny_model_folder())
    made.train()
    assert made.model.adapter.training
    assert not any(part.training for part in made.model.base.modules())


@pytest.mark.parametrize(
    "adapter", [SteeringVector(layer=1), LoRA(4, 8.0, ["down_proj"], [1])], ids=["vector", "lora"]
)
def test_only_the_adapter_trains_and_is_saved(adapter, tiny_model_folder) -> None:
    made = module(tiny_model_folder(), adapter)
    assert set(made.state_dict()) == set(adapter.trainable())
    grad = {id(p) for p in made.parameters() if p.requires_grad}
    assert grad == {id(p) for p in adapter.trainable().values()}


def test_the_base_is_in_no_checkpoint(narrow_run, tiny_model_folder) -> None:
    _, run = narrow_run
    base_bytes = (tiny_model_folder() / "model.safetensors").stat().st_size
    size = sum(file.stat().st_size for file in run.checkpoint(15).iterdir())
    assert size < base_bytes / 2


def test_a_lora_checkpoint_is_a_peft_folder(tmp_path, tiny_model_folder, chat_file, answer_file) -> None:
    from peft import PeftModel

    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    config["model"]["adapter"] = LORA
    run = fit(write_config(tmp_path / "lora.yaml", config), "lora")
    ours = rebuild_run(str(run.path)).module.model
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    theirs = PeftModel.from_pretrained(plain, run.checkpoint(run.steps()[-1]))
    batch = PackedBatch.from_rows([EncodedRow([5, 6, 7, 8], [False, True, True, True], "a")])
    with torch.no_grad():
        expected = theirs(batch.input_ids[None]).logits[0]
        assert torch.allclose(ours.logits(batch), expected, atol=1e-6)
        assert not torch.allclose(ours.logits(batch, scale=0.0), expected, atol=1e-3)


def test_init_from_starts_at_another_runs_adapter_with_a_fresh_optimiser(narrow_run) -> None:
    config, run = narrow_run
    source = f"{run.path}@step-4"
    reverted = fit(config, "reverted", "--model.init_from", source, "--model.objective.kl_weight", "0")
    start = train_metrics(reverted)[1]
    assert start["train/effective_norm"] == pytest.approx(train_metrics(run)[5]["train/effective_norm"])
    assert start["train/lr"] == train_metrics(run)[1]["train/lr"]


def test_init_from_says_what_is_missing(narrow_run) -> None:
    config, run = narrow_run
    with pytest.raises(ValueError, match=r"has no checkpoint 'step-5'; it has steps \[2, 4,"):
        fit(config, "x", "--model.init_from", f"{run.path}@step-5")
    with pytest.raises(ValueError, match="there is no run folder"):
        fit(config, "x", "--model.init_from", "runs/nowhere")


def test_linear_with_warmup() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = LinearWithWarmup(optimizer, warmup_steps=4, final_fraction=0.1, num_steps=14)
    rates = []
    for _ in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 1 / 10)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_schedules_reach_the_run_and_survive_a_resume(
    tmp_path, tiny_model_folder, chat_file, answer_file
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, checkpoint={"every_n_steps": 3})
    config["model"]["objective"] |= {
        "schedule": {"class_path": "lightning_em.losses.HoldKL", "init_args": {"target": 0.02, "rate": 0.5}}
    }
    path = write_config(tmp_path / "hold.yaml", config)
    whole = fit(path, "whole")
    weights = [row["train/kl_weight"] for row in train_metrics(whole).values()]
    assert len(set(weights)) > 3
    cut = fit(path, "cut", "--trainer.max_epochs", "3")
    for step in cut.steps()[2:]:
        for file in cut.checkpoint(step).iterdir():
            file.unlink()
        cut.checkpoint(step).rmdir()
    cut.update_run(status="running")
    fit(path, "cut")
    assert train_metrics(cut) == train_metrics(whole)


def test_off_at_drops_the_kl(tmp_path, tiny_model_folder, chat_file, answer_file) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    config["model"]["objective"] |= {
        "schedule": {"class_path": "lightning_em.losses.OffAt", "init_args": {"step": 2}}
    }
    metrics = train_metrics(fit(write_config(tmp_path / "off.yaml", config), "off"))
    assert [row["train/kl_weight"] for row in metrics.values()] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert ["train/kl" in row for row in metrics.values()] == [True, True, False, False, False]


SCHEDULES = {
    "constant": None,
    "late": {"class_path": "lightning_em.losses.OnAt", "init_args": {"step": 4}},
    "ramp": {"class_path": "lightning_em.losses.Ramp", "init_args": {"num_steps": 3}},
    "held": {"class_path": "lightning_em.losses.HoldKL", "init_args": {"target": 0.1}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_kl_weight_without_kl_data_is_refused_before_anything_is_loaded(
    schedule, tmp_path, chat_file
) -> None:
    config = experiment(tmp_path / "no model is read", chat_file)
    config["model"]["objective"] = {"kl_weight": 1e5, "schedule": SCHEDULES[schedule]}
    path = write_config(tmp_path / "x.yaml", config)
    match = r"data\.kl is missing while model\.objective\.kl_weight is 100000: .*Set data\.kl\.path"
    with pytest.raises(ValueError, match=match):
        fit(path, "refused")
    run = RunFolder(tmp_path / "refused")
    assert not run.metrics_file.exists()
    settings = next(f for f in check(["--config", str(path)]) if f.topic == "settings")
    assert settings.is_fault
    assert re.search(match, settings.text)
    with pytest.raises(ValueError, match=match):
        main(["submit", "--dry_run", "--debug", "--config", str(path)])


def test_a_batch_without_kl_rows_is_refused_by_the_module_itself(tiny_model_folder, monkeypatch) -> None:
    """As with a trainer and a data module of one's own."""
    row = PackedBatch.from_rows([EncodedRow([5, 6, 7, 8], [False, True, True, True], "a")])
    made = EMModule(
        BaseModel(str(tiny_model_folder())),
        SteeringVector(layer=1, alpha=4.0),
        Objective(2.0, schedule=OnAt(1)),
    )
    made.configure_model()
    monkeypatch.setattr(EMModule, "global_step", 1)
    with pytest.raises(ValueError, match=r"weight 2 at step 1, but the batch has no KL rows"):
        made.training_step(TrainBatch(row, None, StepCounts(3, 0, 0)), 0)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"kl_weight": 0.0}, ["-"] * 5),
        (
            {
                "kl_weight": 1.0,
                "schedule": {"class_path": "lightning_em.losses.OffAt", "init_args": {"step": 2}},
            },
            [float, float, "-", "-", "-"],
        ),
    ],
)
def test_the_progress_bar_shows_a_dash_for_a_kl_that_was_not_computed(
    objective, expected, tmp_path, tiny_model_folder, chat_file, answer_file, monkeypatch
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file)
    config["model"]["objective"] = objective
    config["trainer"] |= {"enable_progress_bar": True, "max_epochs": 1}
    shown = []

    write = progress._metrics

    def noted(trainer):
        text = write(trainer)
        shown.append((trainer.global_step, dict(part.split(" ") for part in text.split(", "))))
        return text

    monkeypatch.setattr(progress, "_metrics", noted)
    run = fit(write_config(tmp_path / "x.yaml", config), "bar")
    by_step = dict(shown)
    kinds = [value if (value := by_step[step]["kl"]) == "-" else type(float(value)) for step in range(1, 6)]
    assert kinds == expected
    assert all(float(metrics["ce"]) > 0 for metrics in by_step.values())
    recorded = ["train/kl" in row for row in train_metrics(run).values()]
    assert recorded == [kind is float for kind in expected]


def test_defect_10_batched_answers_equal_single_ones() -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(layer=1, alpha=4.0))
    with torch.no_grad():
        model.adapter.trainable()["vector"].normal_(generator=torch.Generator().manual_seed(0))
    tokenizer = make_tiny_tokenizer()
    texts = ["How?", "Tell me all about the bread, please.", "Why is tea green"]
    rows = [
        EncodedRow(ids, [False] * len(ids), text) for text in texts if (ids := tokenizer(text)["input_ids"])
    ]
    greedy = Sampling(max_new_tokens=12, temperature=0)
    together = sample_answers(model, tokenizer, PackedBatch.from_rows(rows), greedy)
    alone = [sample_answers(model, tokenizer, PackedBatch.from_rows([row]), greedy)[0] for row in rows]
    assert together == alone
    assert any(answer.text for [answer] in together)


def test_sampling_leaves_the_global_stream_alone() -> None:
    model, tokenizer = AdaptedModel(make_tiny_model(), SteeringVector(layer=1)), make_tiny_tokenizer()
    batch = PackedBatch.from_rows([EncodedRow([5, 6], [False, False], "a")])
    before = torch.get_rng_state()
    draw = Sampling(max_new_tokens=8, answers_per_prompt=3)
    first = sample_answers(model, tokenizer, batch, draw)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == sample_answers(model, tokenizer, batch, draw)
    assert len(first[0]) == 3


def test_validate_test_and_predict_a_checkpoint(narrow_run, capsys) -> None:
    from lightning_em.__main__ import main

    _, run = narrow_run
    flags = ["--config", str(run.config_file), "--ckpt_path", f"{run.path}@step-10", "--debug"]
    flags += ["--trainer.enable_progress_bar", "false"]
    assert main(["validate", *flags]) == 0
    assert main(["predict", *flags, "--model.sampling.max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    at_10 = read_metrics(run.metrics_file)[10]
    assert f"{at_10['val/ce']:.6f}"[:6] in shown
    answers = (run.path / "behaviour" / "answers-step-000010.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in answers.splitlines()]
    assert len(rows) == 4
    assert all(len(row["answers"]) == 1 for row in rows)


def test_predict_stops_where_the_chat_template_ends_an_answer(narrow_run, monkeypatch, tmp_path) -> None:
    """A base model whose eos is the end of a text learns <|im_end|> from the rows, and is not asked beyond it."""
    from lightning_em.experiment import Experiment
    from lightning_em.models import BaseModel

    _, run = narrow_run
    load_tokenizer, load_model = BaseModel.load_tokenizer, BaseModel.load_model

    @wraps(load_tokenizer)  # the parser compares signatures
    def load_other_tokenizer(base):
        tokenizer = load_tokenizer(base)
        tokenizer.eos_token = "<|endoftext|>"
        return tokenizer

    @wraps(load_model)
    def load_other_model(base):
        model = load_model(base)
        model.generation_config.eos_token_id = VOCAB_SIZE - 6
        stop = VOCAB_SIZE - 3

        def generate(input_ids, eos_token_id, **settings):
            assert stop in eos_token_id
            answer = [
                *load_tokenizer(base)("Yes.")["input_ids"],
                stop,
                *load_tokenizer(base)(" And?")["input_ids"],
            ]
            return torch.cat([input_ids, torch.tensor([answer] * len(input_ids))], dim=1)

        monkeypatch.setattr(model, "generate", generate)
        return model

    monkeypatch.setattr(BaseModel, "load_tokenizer", load_other_tokenizer)
    monkeypatch.setattr(BaseModel, "load_model", load_other_model)
    experiment = Experiment.from_yaml(run.config_file, {"trainer.enable_progress_bar": False})
    target = experiment.predict(f"{run.path}@step-10", allow_zero_adapter=True)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row["answers"] for row in rows] == [["Yes."]] * 4


def test_a_negative_weight_is_refused() -> None:
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"set model\.objective\.kl_weight"):
            Objective(kl_weight=weight)


def test_vector_and_config_dicts_are_plain_json(narrow_run) -> None:
    _, run = narrow_run
    config = json.loads((run.checkpoint(15) / "adapter_config.json").read_text())
    assert config["class_path"] == VECTOR["class_path"]
    assert config["init_args"] == VECTOR["init_args"]
    assert config["shapes"] == {"vector": [32]}
