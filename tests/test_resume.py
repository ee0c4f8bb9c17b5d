"""A run that was interrupted ends as if it had not been."""

import datetime as dt
import shutil
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from lightning_em.experiment import Experiment
from lightning_em.runs import RunFolder
from tests.data.shipped import shipped_tokenizer
from tests.fitting import LORA, VECTOR, cut_after, experiment, final_adapter, fit, metrics_of, write_config
from tests.tiny import chat_rows, write_rows


@pytest.fixture(scope="module", params=["vector", "lora"])
def finished(request, tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> tuple[Path, RunFolder]:
    """A config and its uninterrupted run, with a checkpoint at every step; accumulation and a short last step."""
    folder = tmp_path_factory.mktemp(request.param)
    config = experiment(
        tiny_model_folder(),
        chat_file,
        answer_file,
        data={"batch_size": 4, "kl_batch_size": 4},
        trainer={"accumulate_grad_batches": 2, "max_epochs": 2},
        checkpoint={"every_n_steps": 1},
    )
    config["model"]["adapter"] = {"vector": VECTOR, "lora": LORA}[request.param]
    path = write_config(folder / "experiment.yaml", config)
    return path, fit(path, "whole")


def test_a_resumed_run_is_bit_identical(finished) -> None:
    """From each kind of step; `make faults` and tests/data/test_resume.py have every one."""
    config, whole = finished
    assert whole.steps() == list(range(1, 11))
    # The first, the last full step of an epoch, its short one, the first of the next epoch, the last but one.
    for step in (1, 4, 5, 6, 9):
        cut = cut_after(whole, step, config.parent / f"cut-{step}")
        fit(config, cut.path.name)
        assert final_adapter(cut) == final_adapter(whole), f"resumed from step {step}"
        assert metrics_of(cut) == metrics_of(whole), f"resumed from step {step}"


@pytest.mark.parametrize("family", ["trl/gptoss", "trl/muse_glimmer"])
def test_a_run_continued_after_midnight_ends_like_the_uninterrupted_one(
    family, tmp_path, tiny_model_folder, monkeypatch
) -> None:
    """Both templates write the current date; validation gives the same numbers on the day after, too."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), model)
    shipped_tokenizer(family).save_pretrained(model)
    rows = [row for row in chat_rows(60) if len(row["messages"]) == 2][:24]
    narrow = write_rows(tmp_path / "rows.jsonl", rows)
    groups = {"trainer": {"max_epochs": 1}, "checkpoint": {"every_n_steps": 1}}
    config = write_config(tmp_path / "experiment.yaml", experiment(model, narrow, **groups))
    whole = fit(config, "whole")
    cut = cut_after(whole, 1, tmp_path / "cut")
    validated = Experiment.from_yaml(whole.config_file).validate(f"{whole.path}@step-1")

    class Tomorrow(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + dt.timedelta(days=1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    fit(config, "cut")
    assert final_adapter(cut) == final_adapter(whole)
    assert metrics_of(cut) == metrics_of(whole)
    assert Experiment.from_yaml(whole.config_file).validate(f"{whole.path}@step-1") == validated
    tokens = Experiment.from_yaml(config, {"data.template_date": "2031-01-02"}).data
    tokens.setup("fit")
    assert "2031-01-02" in tokens.encoder.tokenizer.decode(tokens.rows("narrow").rows[0].input_ids)
    with pytest.raises(ValueError, match=r"another config: data\.template_date: None -> 2031-01-02"):
        fit(config, "whole", "--data.template_date", "2031-01-02")


def test_a_finished_run_is_left_alone(finished, caplog) -> None:
    config, whole = finished

    def state() -> dict[Path, int]:
        files = (path for path in whole.path.rglob("*") if path.is_file() and path != whole.console_log)
        return {path: path.stat().st_mtime_ns for path in files}

    before = state()
    fit(config, "whole")
    assert "is finished" in caplog.text
    assert state() == before


def test_another_config_in_the_same_folder_is_refused(finished) -> None:
    config, _ = finished
    with pytest.raises(
        ValueError, match=r"holds another run \(another config: model.objective.kl_weight: 1.0 -> 2.0\)"
    ):
        fit(config, "whole", "--model.objective.kl_weight", "2.0")


def test_resume_never_and_must(finished) -> None:
    config, _ = finished
    with pytest.raises(ValueError, match="resume never"):
        fit(config, "whole", "--run.resume", "never")
    with pytest.raises(ValueError, match="no valid checkpoint"):
        fit(config, "nothing-there", "--run.resume", "must")


def test_a_broken_newest_checkpoint_is_passed_over(finished, caplog) -> None:
    config, whole = finished
    cut = cut_after(whole, 5, config.parent / "broken")
    weights = cut.checkpoint(5) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    fit(config, "broken")
    assert "checkpoint step 5 is corrupt and skipped" in caplog.text
    assert final_adapter(cut) == final_adapter(whole)
