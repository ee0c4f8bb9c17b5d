"""LoRA against explicit B A, and its folder against plain PEFT."""

import logging
import math
import re
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_em.adapters import LoRA
from lightning_em.models import AdaptedModel
from tests import oracle
from tests.samples import adapted, make_rows, pack
from tests.tiny import ARCHITECTURES, make_tiny_model

KINDS = [(1, 256.0, False), (1, 256.0, True), (4, 8.0, False), (32, 64.0, True)]


def weight_changes(adapter: LoRA) -> dict[str, torch.Tensor]:
    """Factor x B A of each module, in float64."""
    factor = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    tensors = {
        name.removeprefix("base_model.model."): p.detach().double() for name, p in adapter.trainable().items()
    }
    sites = sorted({name.rsplit(".", 2)[0] for name in tensors})
    return {
        f"{s}.weight": factor * tensors[f"{s}.lora_B.weight"] @ tensors[f"{s}.lora_A.weight"] for s in sites
    }


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("rank", "alpha", "rslora"), KINDS)
def test_the_weight_changes_by_b_a(rank, alpha, rslora, scale) -> None:
    rows = make_rows(9, 12)
    model = adapted(
        LoRA(rank, alpha, ["q_proj", "down_proj"], rslora=rslora), dtype=torch.float64, exact=True
    )
    plain = make_tiny_model(dtype=torch.float64)
    weights = dict(plain.named_parameters())
    weights |= {
        name: weights[name] + scale * change for name, change in weight_changes(model.adapter).items()
    }
    with torch.no_grad():
        expected = torch.cat([oracle.row_logits(plain, row, weights) for row in rows])
        torch.testing.assert_close(model.logits(pack(rows), scale), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("rank", "alpha", "rslora"), KINDS)
def test_norm_is_that_of_the_weight_change(rank, alpha, rslora) -> None:
    adapter = adapted(LoRA(rank, alpha, ["q_proj", "down_proj"], rslora=rslora)).adapter
    changes = weight_changes(adapter)
    assert len(changes) == 6
    expected = math.sqrt(sum(change.square().sum().item() for change in changes.values()))
    assert adapter.effective_norm().item() == pytest.approx(expected, rel=1e-6)


# peft asks for a property that transformers renamed
peft_asks_for_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@peft_asks_for_an_old_name
@pytest.mark.parametrize(("rank", "alpha", "rslora"), KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_peft_loads_the_folder(architecture, rank, alpha, rslora, tmp_path) -> None:
    model = adapted(LoRA(rank, alpha, ["down_proj"], [0.5, 2], rslora), architecture)
    model.adapter.save(tmp_path)
    plain = make_tiny_model(architecture)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    batch = pack(make_rows(9, 12))
    rows = batch.padded()
    with torch.no_grad():
        logits = loaded(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        assert torch.equal(logits[rows.attention_mask.bool()], model.logits(batch))


def test_matrices_are_float32_over_any_base_and_b_starts_at_zero() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = adapted(LoRA(2, 4.0, ["down_proj"]), dtype=dtype, size=0.0)
        own = model.adapter.trainable()
        assert {p.dtype for p in own.values()} == {torch.float32}
        assert all(p.eq(0).all() == ("lora_B" in name) for name, p in own.items())
        assert model.logits(pack(make_rows(8))).dtype == dtype


def test_only_the_chosen_layers_and_modules_change() -> None:
    model = adapted(LoRA(2, 4.0, ["down_proj", "v_proj"], [2, 0.5]))
    assert list(weight_changes(model.adapter)) == [
        f"model.layers.{layer}.{name}.weight"
        for layer in (1, 2)
        for name in ("mlp.down_proj", "self_attn.v_proj")
    ]
    assert model.adapter.lowest_layer == 1


@peft_asks_for_an_old_name
def test_layers_ten_and_one_are_told_apart(tmp_path) -> None:
    """PEFT matches module names by their ends."""
    base = make_tiny_model(num_hidden_layers=12, hidden_size=16)
    model = AdaptedModel(base, LoRA(1, 4.0, ["down_proj"], [1]))
    changed = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
    assert changed == ["model.layers.1.mlp.down_proj"]
    model.adapter.save(tmp_path)
    plain = make_tiny_model(num_hidden_layers=12, hidden_size=16)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    names = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert names == ["base_model.model.model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "target_modules": ["down_proj"]}, r"rank must be at least 1, got 0"),
        ({"rank": 1, "target_modules": []}, r"needs a module and a layer, got target_modules \[\]"),
        (
            {"rank": 1, "target_modules": ["down_proj"], "layers": []},
            r"needs a module and a layer, got .* layers \[\]",
        ),
        ({"rank": 1, "target_modules": ["down_proj"], "layers": [7]}, r"layer must be 0\.\.2 .*, got 7"),
        (
            {"rank": 1, "target_modules": ["lm_head"]},
            r"lm_head not found in layers 0-2 .* \(lm_head is outside the decoder layers, where LoRA changes nothing\)",
        ),
        (
            {"rank": 1, "target_modules": ["down_proj", "w2"]},
            r"target_modules w2 not found in layers 0-2 of Qwen2ForCausalLM, where the linear modules are down_proj, ",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptedModel(make_tiny_model(), LoRA(alpha=4.0, **settings))


SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "head_dim": 8,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "eos_token_id": 2},
    "granitemoe": {"num_local_experts": 4},
    "jetmoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
}  # fmt: skip


def with_experts(kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | EXPERTS[kind])))


@pytest.mark.parametrize("layers", [None, [0, 2], [2]], ids=str)
@pytest.mark.parametrize("module", ["down_proj", "gate_proj", "up_proj", "gate_up_proj"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_routed_experts_are_never_left_out_in_silence(kind, module, layers) -> None:
    """Of the shared expert, the layers without experts and the routed experts, the last are not reached."""
    with pytest.raises(ValueError, match=module) as caught:
        AdaptedModel(with_experts(kind), LoRA(2, 4.0, [module], layers))
    message = str(caught.value)
    if kind == "jetmoe":  # whose experts have names of their own
        assert "not reached are the stacked parameters mlp.input_linear.weight" in message
    else:
        assert re.search(r"mlp\.experts\.(down|gate_up)_proj in layers?|block_sparse_moe\.experts", message)
        assert f"where the linear modules are {module}" not in message


@pytest.mark.parametrize("kind", ["qwen3_moe", "dots1", "ernie4_5_moe"])
def test_a_layer_without_experts_that_peft_reads_as_experts_is_refused(kind) -> None:
    with pytest.raises(
        ValueError, match=r"target_modules down_proj .* peft would attach to these in place of"
    ):
        AdaptedModel(with_experts(kind), LoRA(2, 4.0, ["down_proj"], [0]))


def test_a_shared_expert_is_trained_by_its_own_name(caplog, tmp_path) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        model = AdaptedModel(with_experts("qwen2_moe"), LoRA(2, 4.0, ["shared_expert.down_proj"], [1, 2]))
    assert "LoRA: mlp.shared_expert.down_proj of layers 1-2" in caplog.messages
    model.adapter.save(tmp_path)
    loaded = PeftModel.from_pretrained(with_experts("qwen2_moe"), tmp_path)
    wrapped = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert wrapped == [f"base_model.model.model.layers.{k}.mlp.shared_expert.down_proj" for k in (1, 2)]


@pytest.mark.parametrize("kind", EXPERTS)
def test_attention_beside_experts_is_reached_and_listed(kind, caplog) -> None:
    module = "kv_proj" if kind == "jetmoe" else "v_proj"
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        model = AdaptedModel(with_experts(kind), LoRA(2, 4.0, [module]))
    assert len(model.adapter.update()) == 4
    assert re.search(rf"LoRA: self_att\w+\.{module} of layers 0-3$", "\n".join(caplog.messages), re.MULTILINE)


HYBRID = {
    "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4,
    "expert_layer_offset": 3, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
}  # fmt: skip


def test_a_module_that_only_some_layers_have() -> None:
    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **(SMALL | HYBRID)))

    model = AdaptedModel(base(), LoRA(2, 4.0, ["q_proj"]))
    assert model.adapter.reached() == "self_attn.q_proj of layers 1, 3"
    assert model.adapter.lowest_layer == 1
    match = (
        r"q_proj not found in layer 2 of JambaForCausalLM, where the linear modules are down_proj, dt_proj"
    )
    with pytest.raises(ValueError, match=match):
        AdaptedModel(base(), LoRA(2, 4.0, ["q_proj"], [1, 2]))
    with pytest.raises(ValueError, match=r"feed_forward\.experts\.down_proj in layer 3"):
        AdaptedModel(base(), LoRA(2, 4.0, ["down_proj"]))


def gpt2() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=288, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@peft_asks_for_an_old_name
@pytest.mark.parametrize("rslora", [False, True])
def test_conv1d_is_linear_too(rslora, tmp_path) -> None:
    """GPT-2 keeps its weights as [in out]."""
    rows = make_rows(9, 12)
    model = AdaptedModel(gpt2(), LoRA(2, 4.0, ["c_attn", "mlp.c_proj"], [0, 2], rslora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert model.adapter.reached() == "attn.c_attn of layers 0, 2; mlp.c_proj of layers 0, 2"
    changes, plain = weight_changes(model.adapter), gpt2()
    assert changes["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    weights = dict(plain.named_parameters())
    weights |= {name: weights[name] + change.T.float() for name, change in changes.items()}
    padded = pack(rows).padded()

    def padded_logits(base: torch.nn.Module) -> torch.Tensor:
        logits = base(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        return logits[padded.attention_mask.bool()]

    with torch.no_grad():
        expected = torch.cat([oracle.row_logits(plain, row, weights) for row in rows])
        torch.testing.assert_close(model.logits(pack(rows)).double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.logits(pack(rows), 0.0), padded_logits(plain))
    expected_norm = math.sqrt(sum(change.square().sum().item() for change in changes.values()))
    assert model.adapter.effective_norm().item() == pytest.approx(expected_norm, rel=1e-6)
    assert set(model.adapter.write_directions()) == {f"transformer.h.{k}.mlp.c_proj" for k in (0, 2)}
    model.adapter.save(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    with torch.no_grad():
        assert torch.equal(padded_logits(loaded), model.logits(pack(rows)))
