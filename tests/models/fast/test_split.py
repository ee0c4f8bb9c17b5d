import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LoRA, SteeringVector, decoder_layers
from lightning_em.models.fast.fused_head import frozen_head
from lightning_em.models.fast.split import SplitDecoder
from lightning_em.models.selection import FAST_ARCHITECTURES
from tests.models.architectures import LAYERS, QUIRKS, build, rows

LINEAR = {"phi3": ["qkv_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense_4h_to_h"]}


def vector(layer=1):
    return SteeringVector(layer, alpha=1.0)


def lora(name, layer=2):
    return LoRA(2, 4.0, LINEAR.get(name, ["q_proj", "down_proj"]), layers=[layer])


def bound(name, adapter, **overrides):
    model = build(name, **overrides)
    adapter.bind(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, adapter


def padded(batch):
    both = batch.padded()
    return {"input_ids": both.input_ids, "attention_mask": both.attention_mask}


def gradients(logits, adapter):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((logits * weights).sum(), list(adapter.trainable().values()))


@pytest.mark.parametrize("kind", ["vector", "lora"])
@pytest.mark.parametrize("name", QUIRKS)
def test_split_equals_whole_to_the_bit(name, kind):
    model, adapter = bound(name, vector() if kind == "vector" else lora(name))
    inputs = padded(rows((11, 7, 9)))
    whole = model(**inputs, use_cache=False).logits
    split = SplitDecoder(model, adapter)
    below = split.prefix(inputs)
    with split.handed_in(below):
        halves = model(**inputs, use_cache=False).logits
    assert split.cut == 2
    assert torch.equal(halves, whole)
    for ours, theirs in zip(gradients(halves, adapter), gradients(whole, adapter), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize("name", QUIRKS)
def test_final_hidden_through_the_head_gives_the_models_logits(name):
    model, adapter = bound(name, vector())
    batch = rows((11, 7, 9))
    inputs = padded(batch)
    keep = torch.arange(33)[inputs["attention_mask"].flatten().bool()][::2]
    split = SplitDecoder(model, adapter)
    hidden = split.final_hidden(inputs, keep, split.prefix(inputs))
    expected = model(**inputs, use_cache=False).logits.flatten(0, 1)[keep]
    torch.testing.assert_close(frozen_head(model).logits(hidden), expected, rtol=1e-5, atol=1e-5)


def test_every_listed_model_type_is_tested():
    assert {build(name).config.model_type for name in QUIRKS} == set(FAST_ARCHITECTURES)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_cut_equals_the_whole(layer):
    model, adapter = bound("gemma3", vector(layer))
    inputs = padded(rows((6, 9)))
    whole = model(**inputs, use_cache=False).logits
    split = SplitDecoder(model, adapter)
    with split.handed_in(split.prefix(inputs)):
        assert torch.equal(model(**inputs, use_cache=False).logits, whole)
    assert split.cut == layer + 1


def nodes(tensor):
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("kind", ["vector", "lora"])
def test_no_autograd_node_below_the_cut(kind):
    model, adapter = bound("llama", vector() if kind == "vector" else lora("llama"))
    inputs = padded(rows((6, 9)))
    split = SplitDecoder(model, adapter)
    below = split.prefix(inputs)
    assert not below.requires_grad
    visits = []
    for index, block in enumerate(decoder_layers(model)):
        block.register_forward_hook(lambda *_, index=index: visits.append(index))
    hidden = split.final_hidden(inputs, below=below)
    assert visits == [2, 3]
    leaves = {node.variable for node in nodes(hidden) if hasattr(node, "variable")}
    assert leaves == set(adapter.trainable().values())


class TooLow(Adapter):
    """Says layer 2, edits layer 1."""

    def attach(self, base):
        self.shift = nn.Parameter(torch.zeros(32))
        self.edit_input_of(1, lambda hidden: hidden + self.scale * self.shift)
        self.lowest_layer = 2


def test_an_adapter_that_fires_in_the_prefix_raises():
    model, adapter = bound("qwen2", TooLow())
    split = SplitDecoder(model, adapter)
    before = list(decoder_layers(model))
    with pytest.raises(ValueError, match="TooLow changes the model below layer 2"):
        split.prefix(padded(rows((5, 4))))
    assert list(decoder_layers(model)) == before
    with torch.inference_mode(), pytest.raises(ValueError, match="set lowest_layer in TooLow"):
        split.prefix(padded(rows((5, 4))))


def test_frozen_parameters_do_not_hide_where_an_adapter_fires():
    model, adapter = bound("qwen2", TooLow())
    adapter.requires_grad_(False)
    with pytest.raises(ValueError, match="TooLow changes the model below layer 2"):
        SplitDecoder(model, adapter).prefix(padded(rows((5, 4))))
    assert not adapter.shift.requires_grad
    model, honest = bound("qwen2", lora("qwen2"))
    first, *_ = honest.trainable().values()
    first.requires_grad_(False)
    split = SplitDecoder(model, honest)
    split.prefix(padded(rows((5, 4))))
    assert split.adapter_is_above
    assert [p.requires_grad for p in honest.trainable().values()] == [False, True, True, True]


def test_prefix_is_the_reference_whatever_the_scale():
    model, adapter = bound("qwen2", lora("qwen2"))
    inputs = padded(rows((5, 4)))
    split = SplitDecoder(model, adapter)
    with adapter.at_scale(3.0):
        first = split.prefix(inputs)
        assert adapter.scale == 3.0
    with adapter.at_scale(0.0):
        assert torch.equal(split.prefix(inputs), first)


def test_layers_and_hooks_return_after_an_exception():
    model, adapter = bound("qwen2", vector())
    split = SplitDecoder(model, adapter)
    inputs = padded(rows((5, 4)))
    below = split.prefix(inputs)
    before, norm_hooks = list(decoder_layers(model)), len(split.norm._forward_pre_hooks)

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = decoder_layers(model)[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        split.final_hidden(inputs, below=below)
    handle.remove()
    handle = decoder_layers(model)[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        split.prefix(inputs)
    handle.remove()
    assert list(decoder_layers(model)) == before
    assert all(type(block).__name__ == "Qwen2DecoderLayer" for block in before)
    assert len(split.norm._forward_pre_hooks) == norm_hooks
    assert not split.norm._forward_hooks
    assert torch.equal(split.prefix(inputs), below)


def test_a_head_somebody_hooks_into_is_not_fused():
    model, _ = bound("qwen2", vector())
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="not a plain linear module"):
        frozen_head(model)
