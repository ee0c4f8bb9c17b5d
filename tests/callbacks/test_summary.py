"""A fit says what it trains, what came out and what is wrong with it."""

import re

import pytest

from lightning_em.callbacks import closing
from lightning_em.callbacks.summary import _warnings
from lightning_em.models import RowLosses
from lightning_em.rebuild import rebuild_run
from lightning_em.records import read_metrics
from tests.fitting import LORA, cut_after, experiment, fit, metrics_of, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_folder, chat_file, answer_file):
    """An experiment that ends within its second epoch of five steps."""
    made = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": -1, "max_steps": 7})
    return write_config(tmp_path_factory.mktemp("summary") / "experiment.yaml", made)


@pytest.fixture(scope="module")
def run(config):
    return fit(config, "run")


def block(caplog, title: str) -> dict[str, str]:
    """Lines of the summary with this title, by their names."""
    [text] = [r.message for r in caplog.records if r.message.startswith(title)]
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines()[1:])


def test_the_start_says_what_is_trained(config, tiny_model_folder, tmp_path, caplog) -> None:
    flags = ["--trainer.accumulate_grad_batches", "2", "--data.batch_size", "3", "--trainer.max_steps", "2"]
    flags += ["--model.objective.kl_reduction", "per_token_and_vocab", "--model.objective.kl_weight", "576"]
    with caplog.at_level("INFO", logger="lightning_em"):
        run = fit(config, "start", *flags)
    lines = block(caplog, f"{run.path}\n")
    assert lines["base model"].startswith(f"{tiny_model_folder()}, float32, ")
    assert lines["adapter"] == (
        "SteeringVector(layer=0.5, alpha=4.0) into layer 2 of layers 0 to 2, 32 trainable parameters"
    )
    assert re.fullmatch(
        r"36 rows, [\d,]+ tokens, [\d,]+ of them in answers; 4 more rows held out", lines["narrow data"]
    )
    assert lines["loss"].endswith("and vocabulary entry; 2 x KL in nats per token")
    assert lines["step"] == "6 narrow and 16 KL rows (2 micro-batches)"
    assert lines["steps"] == "2 in 0.333 epochs"  # of six steps each
    assert re.fullmatch(r"1, about 0\.\d MB each; [\d.,]+ GB are free", lines["checkpoints"])


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "steps"),
    [
        (4, 3, "3 in 0.6 epochs"),
        (4, 7, "7 in 1.4 epochs"),
        (1, -1, "5 in 1 epoch"),
        (2, 30, "10 in 2 epochs"),
    ],
)
def test_the_epochs_are_those_of_the_steps_taken(
    config, tmp_path, caplog, max_epochs, max_steps, steps
) -> None:
    """A fit of 3 steps with max_epochs 4 said `3 in 4 epochs`."""
    trainer = [f"--trainer.max_epochs={max_epochs}", f"--trainer.max_steps={max_steps}"]
    with caplog.at_level("INFO", logger="lightning_em"):
        run = fit(config, f"epochs-{max_epochs}-{max_steps}", *trainer)
    assert block(caplog, f"{run.path}\n")["steps"] == steps


def test_a_lora_names_its_layers(config, tmp_path, caplog) -> None:
    adapter = str(
        write_config(tmp_path / "lora.yaml", {**LORA, "init_args": LORA["init_args"] | {"layers": [1, 2]}})
    )
    with caplog.at_level("INFO", logger="lightning_em"):
        run = fit(
            config,
            "lora",
            "--model.adapter",
            adapter,
            "--trainer.max_steps",
            "1",
            "--model.objective.kl_weight=0",
        )
    lines = block(caplog, f"{run.path}\n")
    assert "in layers 1 to 2 of layers 0 to 2, 640 trainable" in lines["adapter"]
    assert lines["loss"] == "CE, nats per token; the KL is only measured on held-out rows"
    assert lines["step"] == "8 narrow rows (1 micro-batch)"


def test_the_last_step_is_validated_before_its_checkpoint(run) -> None:
    table = read_metrics(run.metrics_file)
    assert [step for step, row in table.items() if "val/ce" in row] == [5, 7]
    assert [step for step, row in table.items() if "val/base_ce" in row] == [7]
    lines = run.metrics_file.read_text().splitlines()
    assert len([line for line in lines if line.startswith("7,val/ce")]) == 1


def test_the_base_ce_is_that_of_scale_zero(run) -> None:
    loaded = rebuild_run(str(run.path))
    loaded.data.trainer = None
    batches = loaded.data.val_dataloader()[0]
    sums, counts = RowLosses.concat([loaded.module.model.row_ce(batch, scale=0.0) for batch in batches])
    found = read_metrics(run.metrics_file)[7]
    assert found["val/base_ce"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5)
    assert found["val/ce"] < found["val/base_ce"]


def test_a_run_that_is_cut_before_its_last_step_ends_the_same(config, run, tmp_path) -> None:
    cut = cut_after(run, 6, config.parent / "cut")
    fit(config, "cut")
    assert metrics_of(cut) == metrics_of(run)


def test_the_end_says_what_came_out_and_what_is_next(config, run, caplog) -> None:
    last = read_metrics(run.metrics_file)[7]
    with caplog.at_level("INFO", logger="lightning_em"):
        fit(config, "run")
    lines = block(caplog, f"{run.path} is finished, step 7\n")
    assert lines["CE"] == (
        f"{last['val/ce']:.3f} nats per token on held-out narrow rows (base model {last['val/base_ce']:.3f})"
    )
    assert lines["KL"].startswith(f"{last['val/kl']:.4f} nats per token on held-out KL rows")
    assert lines["effective norm"] == f"{last['train/effective_norm']:.4g}"
    assert lines["stored"] == "4 checkpoints, metrics.csv"
    assert lines["next"] == f"lightning-em sample {run.path}"
    assert run.read_run()["warnings"] == []


def test_a_run_that_ends_worse_than_its_base_warns(config, caplog) -> None:
    worse = fit(config, "worse", "--model.optimizer.init_args.lr=1000", "--model.objective.kl_weight=10")
    [*_, told] = [record for record in caplog.records if record.levelname == "WARNING"]
    [first, *_] = worse.read_run()["warnings"]
    assert re.match(
        r"CE.* on held-out \S*\s?rows is [\d.]+ nats per token, and [\d.]+ without the adapter", first
    )
    assert told.message in {f"warning: {each}" for each in worse.read_run()["warnings"]}
    assert closing(worse)[1] == worse.read_run()["warnings"]


@pytest.mark.parametrize(
    ("last", "messages"),
    [
        ({"val/ce": 1.0, "val/base_ce": 1.5, "val/kl": 0.3, "train/kl_weight": 1.0}, []),
        ({"val/ce": 1.0, "val/base_ce": 1.5, "val/kl": 0.3}, []),
        ({"val/ce": 1.55, "val/base_ce": 1.5}, []),
        ({"val/ce": 1.7, "val/base_ce": 1.5}, ["CE on held-out narrow rows is 1.700 nats per token, and 1.500"]),
        (
            {"val/ce": 1.0, "val/base_ce": 1.5, "val/kl": 0.3, "train/kl_weight": 10.0},
            [r"CE \+ KL weight x KL on held-out rows is 4.000 nats per token, and 1.500"],
        ),
        ({"val/ce": 1.0, "val/base_ce": 1.5, "val/kl": 4.0}, ["KL is 4.00 nats per token: .* become 55 times less"]),
        ({"train/ce": 9.0}, []),
    ],
)  # fmt: skip
def test_what_is_warned_of(last, messages) -> None:
    found = _warnings(last)
    assert len(found) == len(messages)
    assert all(map(re.search, messages, found))


def test_the_last_weight_of_a_schedule_is_not_judged() -> None:
    last = {"val/ce": 1.0, "val/base_ce": 1.5, "val/kl": 0.3, "train/kl_weight": 1000.0}
    assert _warnings(last, has_schedule=True) == []
    assert len(_warnings(last)) == 1
