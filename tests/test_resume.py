"""A run that was interrupted ends as if it had not been."""

from pathlib import Path

import pytest

from lightning_em.runs import RunFolder
from tests.fitting import LORA, VECTOR, cut_after, experiment, final_adapter, fit, metrics_of, write_config


@pytest.fixture(scope="module", params=["vector", "lora"])
def finished(request, tmp_path_factory, tiny_model_folder, chat_file, answer_file) -> tuple[Path, RunFolder]:
    """A config and its uninterrupted run, with a checkpoint at every step; accumulation and a short last window."""
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
    # The first, the last full window of an epoch, its short one, the first of the next epoch, the last but one.
    for step in (1, 4, 5, 6, 9):
        cut = cut_after(whole, step, config.parent / f"cut-{step}")
        fit(config, cut.path.name)
        assert final_adapter(cut) == final_adapter(whole), f"resumed from step {step}"
        assert metrics_of(cut) == metrics_of(whole), f"resumed from step {step}"


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
