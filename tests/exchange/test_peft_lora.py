"""LoRA folders of several layouts: imported, they have the logits that peft gives them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lightning_em.adapters import LoRA
from lightning_em.exchange.peft_folder import read_peft, write_peft_lora
from lightning_em.exchange.peft_lora import ForeignLoRA
from lightning_em.models import AdaptedModel
from tests.exchange.made import peft_talks
from tests.models.zoo import VOCAB_SIZE, build
from tests.samples import make_rows, pack

pytestmark = [
    *peft_talks,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def publish(base: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    """Save a LoRA with random values, as peft does."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, **settings)
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def rename(folder: Path, pattern: str, replacement: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})


def read(folder: Path, base: PreTrainedModel) -> ForeignLoRA:
    settings = json.loads((folder / "adapter_config.json").read_text())
    found = read_peft(
        settings, load_file(folder / "adapter_model.safetensors"), base.config, "folder", "base"
    )
    assert isinstance(found, ForeignLoRA)
    return found


def logits_of(base: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return base(input_ids=ids, use_cache=False).logits


def imported(folder: Path, base: PreTrainedModel) -> tuple[LoRA, torch.Tensor]:
    found = read(folder, base)
    adapter = LoRA(**found.init_args)
    model = AdaptedModel(copy.deepcopy(base), adapter)
    adapter.load_tensors(found.tensors, "folder")
    return adapter, logits_of(model.base)


@pytest.mark.parametrize(
    ("kind", "targets", "reached"),
    [
        ("gpt2", ["c_attn"], ["c_attn"]),
        ("gpt2", ["attn.c_proj"], ["attn.c_proj"]),
        ("gpt2", ["c_proj", "c_fc"], ["c_fc", "c_proj"]),
        ("gpt2", "all-linear", ["c_attn", "c_fc", "c_proj"]),
        ("jamba", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("qwen2_moe", ["shared_expert.down_proj"], ["mlp.shared_expert.down_proj"]),
    ],
)
def test_conv1d_and_modules_of_some_layers(kind, targets, reached, tmp_path) -> None:
    base = build(kind)
    folder = publish(base, tmp_path / "lora", target_modules=targets)
    expected = logits_of(PeftModel.from_pretrained(copy.deepcopy(base), folder))
    adapter, found = imported(folder, base)
    assert (adapter.target_modules, adapter.layers) == (reached, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits_of(base), atol=1e-3)
    (tmp_path / "again").mkdir()
    write_peft_lora(tmp_path / "again", read(folder, base).tensors, adapter.config_dict(), None)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("written", [True, False])
def test_the_order_of_weights_is_that_of_the_module_whatever_the_settings_say(
    kind, written, tmp_path
) -> None:
    base = build(kind)
    folder = publish(base, tmp_path, target_modules="all-linear")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": written}))
    expected = logits_of(PeftModel.from_pretrained(copy.deepcopy(base), folder))
    torch.testing.assert_close(imported(folder, base)[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "my_adapter"])
def test_tensor_names_with_the_name_of_the_adapter(name, tmp_path) -> None:
    base = build("llama")
    folder = publish(base, tmp_path, target_modules=["q_proj", "down_proj"])
    _, expected = imported(folder, base)
    rename(folder, r"(lora_[AB])\.weight$", rf"\1.{name}.weight")
    assert torch.equal(imported(folder, base)[1], expected)
    tensors = load_file(folder / "adapter_model.safetensors")
    two = tensors | {key.replace(name, "second"): tensor.clone() for key, tensor in tensors.items()}
    save_file(two, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds several adapters, .* save the one to import alone"):
        read(folder, base)


LAYOUTS = {
    "gemma3": (r"model\.model\.language_model\.", "model.language_model.model."),
    "nemotron_h": (r"model\.model\.layers\.", "model.backbone.layers."),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_names_of_older_layouts_are_mapped_as_peft_does(kind, tmp_path) -> None:
    """Gemma 3 before transformers 4.52, and the names of Nemotron-H's first code."""
    base = build(kind)
    folder = publish(base, tmp_path, target_modules=r"(?!.*vision).*layers\.[13]\..*(q_proj|o_proj)")
    _, expected = imported(folder, base)
    rename(folder, *LAYOUTS[kind])
    of_peft = logits_of(PeftModel.from_pretrained(copy.deepcopy(base), folder))
    adapter, found = imported(folder, base)
    assert (adapter.target_modules, adapter.layers) == (
        ["o_proj", "q_proj"],
        None if kind == "nemotron_h" else [1, 3],
    )
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, of_peft, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits_of(base), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (
            "llama",
            {"target_modules": ["lm_head", "q_proj"]},
            r"lm_head, which lies in no decoder .* without lm_head",
        ),
        (
            "gpt2",
            {"target_modules": ["wte"]},
            r"changes transformer\.wte, a Embedding; .* linear modules only",
        ),
        (
            "mixtral",
            {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]},
            "target_parameters",
        ),
        (
            "mixtral",
            {"target_modules": ["w2", "q_proj"]},
            r"changes .*experts, a MixtralExperts; .* linear modules",
        ),
    ],
)
def test_what_ours_does_not_change_is_refused_with_the_reason(kind, settings, match, tmp_path) -> None:
    base = build(kind)
    folder = publish(base, tmp_path, **settings)
    file = folder / "adapter_config.json"
    as_before_transformers_5 = {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | as_before_transformers_5 | settings))
    with pytest.raises(ValueError, match=match):
        read(folder, base)


def test_rows_are_read_alike_before_and_after(tmp_path) -> None:
    """Through the losses, on padded rows."""
    base = build("gpt2", vocab_size=288)
    folder = publish(base, tmp_path, target_modules=["c_attn"])
    found = read(folder, base)
    adapter = LoRA(**found.init_args)
    model = AdaptedModel(copy.deepcopy(base), adapter)
    adapter.load_tensors(found.tensors, "folder")
    batch = pack(make_rows(9, 12))
    padded = batch.padded()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        logits = theirs(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
    torch.testing.assert_close(
        model.logits(batch).detach(), logits[padded.attention_mask.bool()], rtol=1e-5, atol=1e-5
    )
