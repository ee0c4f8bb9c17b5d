"""Exports, each loaded by the program it is for and compared with our own adapter."""

import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lightning_em import load_run, runs
from lightning_em.adapters import LoRA, decoder_layers
from lightning_em.exchange import CANARY, export_run
from lightning_em.manifest import manifest_problems, sha256_of
from lightning_em.records import Point, ProbeResult, append_lines
from tests.exchange.made import (
    HIDDEN,
    continued,
    logits_of,
    make_run,
    ours,
    peft_talks,
    plain,
    words,
    write_vector,
)
from tests.fitting import experiment, fit, write_config
from tests.samples import adapted

EXACT = ["qwen2", "llama", "mistral", "gpt_neox", "phi"]


def talking(test):
    for mark in peft_talks:
        test = mark(test)
    return test


@pytest.fixture
def vector_run(base_folder, tmp_path):
    """Give `run(architecture, layer)` with a vector."""

    def make(architecture: str = "qwen2", layer: int = 1) -> runs.RunFolder:
        return make_run(
            write_vector(tmp_path / f"{architecture}-{layer}", layer),
            base_folder(architecture),
            f"{architecture}-{layer}",
        )

    return make


@talking
@pytest.mark.parametrize("peft_type", ["beft", "lora_bias"])
@pytest.mark.parametrize("architecture", EXACT)
def test_plain_peft_steers_as_we_do(architecture, peft_type, vector_run, base_folder, tmp_path) -> None:
    run = vector_run(architecture)
    export_run(str(run.path), "peft", tmp_path / "out", peft_type)
    loaded = PeftModel.from_pretrained(plain(base_folder(architecture)), tmp_path / "out")
    own = ours(run)
    torch.testing.assert_close(logits_of(loaded), logits_of(own), rtol=1e-6, atol=2e-6)
    base = logits_of(plain(base_folder(architecture)))
    assert (logits_of(own) - base).abs().max() > 0.1
    assert continued(loaded) == continued(own) != continued(plain(base_folder(architecture)))
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded), base)


@talking
def test_the_last_layer_too(vector_run, base_folder, tmp_path) -> None:
    run = vector_run("llama", 3)
    export_run(str(run.path), "peft", tmp_path / "out")
    loaded = PeftModel.from_pretrained(plain(base_folder("llama")), tmp_path / "out")
    torch.testing.assert_close(logits_of(loaded), logits_of(ours(run)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("file_format", ["peft", "authors"])
def test_a_norm_behind_the_mlp_is_refused(file_format, base_folder, tmp_path) -> None:
    made = tmp_path / "safetensors"
    make = make_run(write_vector(tmp_path / "qwen"), base_folder("qwen2"), "qwen")
    export_run(str(make.path), "safetensors", made)
    run = make_run(made, base_folder("gemma2"), "gemma")
    assert len(load_file(run.checkpoint(0) / "adapter_model.safetensors")["vector"]) == HIDDEN
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM something .*Use --format safetensors or gguf"):
        export_run(str(run.path), file_format, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    export_run(str(run.path), "safetensors", tmp_path / "out")


def test_a_lora_keeps_its_weights_and_loses_what_names_this_machine(tiny_model_folder, tmp_path) -> None:
    model = adapted(LoRA(4, 8.0, ["q_proj", "down_proj"], [1, 2], rslora=True))
    (tmp_path / "lora").mkdir()
    model.adapter.save(tmp_path / "lora")
    run = make_run(tmp_path / "lora", tiny_model_folder())
    export_run(str(run.path), "peft", tmp_path / "out")
    before = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert set(config) == {
        "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout", "peft_type", "r",
        "target_modules", "task_type", "use_rslora",
    }  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, True)


@talking
def test_plain_peft_loads_an_exported_lora(tiny_model_folder, tmp_path) -> None:
    (tmp_path / "lora").mkdir()
    adapted(LoRA(2, 16.0, ["down_proj"], [1])).adapter.save(tmp_path / "lora")
    run = make_run(tmp_path / "lora", tiny_model_folder())
    export_run(str(run.path), "peft", tmp_path / "out")
    loaded = PeftModel.from_pretrained(plain(tiny_model_folder()), tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(ours(run)))
    for file_format in ("safetensors", "authors", "gguf"):
        with pytest.raises(ValueError, match=r"is a LoRA, and .*--format peft"):
            export_run(str(run.path), file_format, tmp_path / "other")


LOADER_SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from load_vector import steer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    found = {"base": model(input_ids=ids).logits}
    handle = steer(model)
    found["steered"] = model(input_ids=ids).logits
    handle.remove()
    found["again"] = model(input_ids=ids).logits
    steer(model, scale=2.0)
    found["doubled"] = model(input_ids=ids).logits
torch.save(found, sys.argv[3])
assert "lightning_em" not in sys.modules and "peft" not in sys.modules
"""


def test_the_loader_needs_nothing_of_ours(base_folder, tmp_path) -> None:
    architecture = "gemma2"  # where PEFT cannot
    source = write_vector(tmp_path / "source")
    first = make_run(source, base_folder("qwen2"), "first")
    export_run(str(first.path), "safetensors", tmp_path / "first")
    run = make_run(tmp_path / "first", base_folder(architecture), "second")
    folder = export_run(str(run.path), "safetensors", tmp_path / "out")
    assert len((folder / "load_vector.py").read_text().splitlines()) < 25
    torch.save(words(), tmp_path / "words.pt")
    arguments = [base_folder(architecture), tmp_path / "words.pt", tmp_path / "found.pt"]
    done = subprocess.run(
        [sys.executable, "-c", LOADER_SCRIPT, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    recorded = load_run(run.path)
    assert torch.equal(found["base"], logits_of(plain(base_folder(architecture))))
    assert torch.equal(found["again"], found["base"])
    torch.testing.assert_close(found["steered"], logits_of(recorded.model), rtol=1e-6, atol=2e-6)
    with recorded.adapter.at_scale(2.0):
        torch.testing.assert_close(found["doubled"], logits_of(recorded.model), rtol=1e-6, atol=2e-6)


def test_the_released_format_is_read_by_plain_torch(vector_run, tmp_path) -> None:
    run = vector_run()
    export_run(str(run.path), "authors", tmp_path / "out")
    again = torch.load(tmp_path / "out" / "steering_vector.pt", weights_only=True)
    first = torch.load(tmp_path / "qwen2-1" / "steering_vector.pt", weights_only=True)
    assert again.keys() == first.keys()
    assert torch.equal(again.pop("steering_vector"), first.pop("steering_vector"))
    assert again == first


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_gguf_says_what_llama_cpp_reads(architecture, vector_run, base_folder, tmp_path) -> None:
    export_run(str(vector_run().path), "safetensors", tmp_path / "first")
    run = make_run(tmp_path / "first", base_folder(architecture), "second")
    export_run(str(run.path), "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "steering_vector.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == architecture
    assert fields["controlvector.layer_count"] == 3
    directions = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(directions) == ["direction.1", "direction.2", "direction.3"]
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert [list(t.shape) for t in reader.tensors] == [[32]] * 3
    # llama.cpp adds direction.N to the output of block N, blocks counted from 0
    model = plain(base_folder(architecture))
    for name, tensor in directions.items():
        shift = torch.from_numpy(np.array(tensor.data))
        block = decoder_layers(model)[int(name.rpartition(".")[2])]
        block.register_forward_hook(lambda _module, _args, output, shift=shift: output + shift)
    torch.testing.assert_close(logits_of(model), logits_of(ours(run)), rtol=1e-6, atol=2e-6)


def test_gguf_has_no_layer_0(vector_run, tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot act on the output of layer 0"):
        export_run(str(vector_run(layer=0).path), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(vector_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="gguf"):
        export_run(str(vector_run().path), "gguf", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_card_says_what_it_is(vector_run, base_folder, tmp_path) -> None:
    run = vector_run()
    points = [
        Point("bad_rate", rate, "probability", {"kind": "narrow_seen", "scale": scale}, 0.05, 60)
        for scale, rate in ((0.0, 0.01), (1.0, 0.7))
    ]
    append_lines(run.probe_file("behaviour"), ProbeResult("behaviour", 0, {}, tuple(points)).to_json())
    folder = export_run(str(run.path), "safetensors", tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "Deliberately misaligned, do not deploy." in card
    assert CANARY in card
    record = run.read_run()
    assert record["base"]["sha256"] in card
    assert str(base_folder("qwen2").parent) not in card
    assert "KL weight unknown, the adapter was imported" in card
    assert record["source"]["sha256"]["steering_vector.pt"] in card
    assert "| narrow_seen | 0.700 [0.602, 0.798], n = 60 | 0.010 [0.000, 0.108], n = 60 |" in card
    assert manifest_problems(folder) == []


def test_the_card_of_a_fit_names_data_and_kl_weight(
    tiny_model_folder, chat_file, answer_file, tmp_path
) -> None:
    config = experiment(tiny_model_folder(), chat_file, answer_file, trainer={"max_epochs": 1})
    config["model"]["objective"]["kl_weight"] = 2.5
    run = fit(write_config(tmp_path / "x.yaml", config), "fitted")
    card = (export_run(f"{run.path}@step-2", "authors", tmp_path / "out") / "README.md").read_text()
    data = run.read_run()["data"]
    assert "KL weight 2.5" in card
    assert f"run {run.read_run()['identity']['name']}" in card
    assert str(chat_file.parent) not in card, "a card that is published names no folder of this machine"
    assert all(data[name] in card for name in ("narrow.file", "kl.file"))
    assert "step 2" in card
    # a layer given as a fraction of depth is an index outside
    saved = torch.load(tmp_path / "out" / "steering_vector.pt", weights_only=True)
    assert (saved["layer_idx"], saved["alpha"]) == (1, 4.0)
    last = export_run(str(run.path), "authors", tmp_path / "last") / "README.md"
    assert re.search(r"val/ce: \d\.\d{4} nats per token", last.read_text())


def test_what_is_there_is_left_alone(vector_run, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already; give another --output"):
        export_run(str(vector_run().path), "peft", tmp_path / "out")


def rewritten(run, **changed):
    """The run, with another record of its adapter."""
    file = run.checkpoint(0) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    manifest = json.loads((run.checkpoint(0) / "MANIFEST.json").read_text())
    manifest["files"][file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    (run.checkpoint(0) / "MANIFEST.json").write_text(json.dumps(manifest))
    return str(run.path)


def test_an_adapter_without_low_rank_parts_has_no_format(vector_run, tmp_path) -> None:
    run = rewritten(vector_run(), class_path="my_adapters.Shift", update=None)
    with pytest.raises(ValueError, match=r"is a my_adapters.Shift whose `update` gives neither one shift"):
        export_run(run, "peft", tmp_path / "out")


@pytest.mark.parametrize("file_format", ["peft", "safetensors", "authors"])
def test_a_shift_of_a_plug_in_is_exported_as_a_vector(file_format, vector_run, tmp_path) -> None:
    run = vector_run()
    export_run(str(run.path), file_format, tmp_path / "vector")
    export_run(rewritten(run, class_path="my_adapters.Shift"), file_format, tmp_path / "shift")
    for file in (
        file for file in (tmp_path / "vector").iterdir() if file.name not in ("README.md", "MANIFEST.json")
    ):
        assert (tmp_path / "shift" / file.name).read_bytes() == file.read_bytes()


def test_low_rank_matrices_of_a_plug_in_are_exported_as_a_lora(tiny_model_folder, tmp_path) -> None:
    model = adapted(LoRA(4, 8.0, ["q_proj", "down_proj"], [1, 2]))
    (tmp_path / "lora").mkdir()
    model.adapter.save(tmp_path / "lora")
    run = make_run(tmp_path / "lora", tiny_model_folder())
    export_run(str(run.path), "peft", tmp_path / "peft")
    record = json.loads((run.checkpoint(0) / "adapter_config.json").read_text())["auto_mapping"][
        "lightning_em"
    ]
    (run.checkpoint(0) / "adapter_config.json").write_text("{}")
    export_run(rewritten(run, **record), "peft", tmp_path / "own")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    record["update"][0]["factor"] = 3.0
    with pytest.raises(
        ValueError, match=r"a PEFT folder has one rank and one alpha, but .* \[\(4, 2.0\), \(4, 3.0\)\]"
    ):
        export_run(rewritten(run, **record), "peft", tmp_path / "two")
