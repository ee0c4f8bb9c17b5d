"""LoRA against explicit B A, and its folder against plain PEFT."""

import math

import pytest
import torch
from peft import PeftModel

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
            {"rank": 1, "target_modules": ["down_proj", "w2"]},
            r"target_modules \['w2'\] not found in Qwen2ForCausalLM, whose layers have \['down_proj', 'gate_proj'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptedModel(make_tiny_model(), LoRA(alpha=4.0, **settings))
