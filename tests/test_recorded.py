"""What a notebook gets from `lightning_em.load_run`."""

import subprocess
import sys

import pytest
import torch

from lightning_em import load_run
from lightning_em.batch import PackedBatch
from lightning_em.rebuild import rebuild_run
from lightning_em.runs import RunFolder
from tests.fitting import LORA, VECTOR, experiment, fit, train_metrics, write_config

PROBING = {
    "probes": [{"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [0.0, 1.0, 2.0]}}]
}


@pytest.fixture(scope="module", params=[VECTOR, LORA], ids=["vector", "lora"])
def run(request, tmp_path_factory, tiny_model_folder, chat_file) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs")
    config = experiment(tiny_model_folder(), chat_file, probing=PROBING)
    config["model"]["adapter"] = request.param
    config["trainer"]["max_epochs"] = 1
    return fit(write_config(folder / "experiment.yaml", config), "run")


def logits(loaded, batch: PackedBatch) -> torch.Tensor:
    rows = batch.padded()
    with torch.no_grad():
        return loaded.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits


def test_model_is_the_checkpoints_model_to_the_bit(run) -> None:
    known = rebuild_run(str(run.path))
    [batch] = known.data.probe_batches("narrow", 2, 2)
    loaded = load_run(run.path)
    real = batch.padded().attention_mask.bool()
    assert torch.equal(logits(loaded, batch)[real], known.module.model.logits(batch, 1.0))
    with loaded.adapter.at_scale(0.0):
        assert torch.equal(logits(loaded, batch)[real], known.module.model.logits(batch, 0.0))


def test_step_chooses_the_checkpoint(run) -> None:
    first, last = load_run(f"{run.path}@step-2"), load_run(run.path)
    assert (first.step, last.step) == (2, run.steps()[-1])
    norms = [loaded.adapter.effective_norm().item() for loaded in (first, last)]
    recorded = last.records[last.records.quantity == "effective_norm"].set_index("step")["value"]
    assert norms == pytest.approx([recorded[2], recorded[last.step]], rel=1e-6)


def test_model_generates(run) -> None:
    loaded = load_run(run.path)
    messages = [{"role": "user", "content": "How do I begin with tea?"}]
    prompt = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = loaded.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= prompt["input_ids"].shape[1] + 3
    assert not loaded.model.training


def test_frames_hold_what_the_files_hold(run) -> None:
    loaded = load_run(run.path)
    assert {step: row["train/ce"] for step, row in train_metrics(run).items()} == dict(
        loaded.metrics["train/ce"]
    )
    points = [point for result in run.probe_results() for point in result.points]
    assert loaded.records["value"].tolist() == [point.value for point in points]


def test_data_need_not_be_there(run, chat_file, tmp_path) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "checkpoints").symlink_to(run.checkpoints.resolve())
    config = run.config_file.read_text(encoding="utf-8").replace(str(chat_file), "/nowhere/rows.jsonl")
    (moved / "config.yaml").write_text(config, encoding="utf-8")
    assert load_run(moved).model.config.hidden_size == 32


def test_missing_run_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="there is no run folder"):
        load_run(tmp_path / "none")


def test_frames_need_no_torch(run) -> None:
    code = "import sys; from lightning_em import load_run; r = load_run(sys.argv[1]); r.metrics; r.records; "
    code += "print(*{'torch', 'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
