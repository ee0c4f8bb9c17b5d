"""The key of stored states sees every bit of the base at its place, and everything the arithmetic depends on."""

from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.models import AdaptedModel
from lightning_em.models.fast.cache_key import _BLOCK_BYTES, _block_sums, model_key, row_key
from tests.models.architectures import build

ADAPTERS = {
    "vector": lambda: SteeringVector(1),
    "lora": lambda: LoRA(2, 4.0, ["q_proj", "down_proj"], layers=[2]),
    "lora_everywhere": lambda: LoRA(2, 4.0, ["q_proj"]),
}


def made(adapter="vector", name="qwen2", **settings):
    return AdaptedModel(build(name, **settings), ADAPTERS[adapter]())


def name_of(model, layout="packed"):
    return model_key(model.base, model.adapter.trainable().values(), layout)


def test_the_key_knows_what_changes_the_states():
    model = made()
    first = name_of(model)
    assert name_of(made()) == first
    assert name_of(model, "padded") != first
    assert name_of(made(dtype=torch.bfloat16)) != first
    assert name_of(made(name="qwen3")) != first
    ids = torch.tensor([1, 2, 3])
    keys = {
        row_key(space, kind, row, mask)
        for space, kind, row, mask in product("ab", "cd", (ids, ids.flip(0)), (None, ids > 1))
    }
    assert len(keys) == 16


def swap(weight, *places):
    one, two = places
    weight[[one, two]] = weight[[two, one]].clone()


CHANGES = {
    "one entry scaled": lambda weight: weight[3, 5].mul_(1.01),
    "two rows swapped": lambda weight: swap(weight, 11, 12),
    "rows far apart swapped": lambda weight: swap(weight, 0, len(weight) - 1),
    "two entries swapped": lambda weight: swap(weight.view(-1), 100, 301),
    "two neighbours swapped": lambda weight: swap(weight.view(-1), 6, 7),
    "two signs changed": lambda weight: weight.view(-1)[40:44:3].neg_(),
    "last entry": lambda weight: weight[-1, -1].mul_(1.01),
    "columns rolled": lambda weight: weight.copy_(weight.roll(1, 1)),
    "one sign changed": lambda weight: weight[0, 0].copy_(-weight[0, 0]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_change_of_a_weight_is_another_key(dtype, change):
    model = made(dtype=dtype, vocab_size=2048)
    first = name_of(model)
    with torch.no_grad():
        CHANGES[change](model.base.model.embed_tokens.weight)
    assert name_of(model) != first


def mixed(word, place):
    """SplitMix64 in Python's own integers."""
    whole = (1 << 64) - 1
    word ^= place * 0x9E3779B97F4A7C15 & whole
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & whole
    word = (word ^ word >> 27) * 0x94D049BB133111EB & whole
    return word ^ word >> 31


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_the_sum_is_that_of_the_formula(dtype, size):
    tensor = (100 * torch.randn(size, generator=torch.Generator().manual_seed(size))).to(dtype)
    content = bytes(tensor.view(torch.uint8).tolist())
    words = [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]
    expected = sum(mixed(word, place) for place, word in enumerate(words))
    assert [found % (1 << 64) for found in _block_sums(tensor)] == [expected % (1 << 64)]


def test_every_bit_counts_where_it_stands():
    tensor = torch.zeros(5, dtype=torch.int32)
    seen = {tuple(_block_sums(tensor))}
    for entry, bit in product(range(5), range(32)):
        changed = tensor.clone()
        changed[entry] = (1 << bit) - (1 << 32 if bit == 31 else 0)
        seen.add(tuple(_block_sums(changed)))
    assert len(seen) == 1 + 5 * 32


def test_the_order_of_blocks_and_strides_count():
    blocks = torch.randn(3, _BLOCK_BYTES // 4, generator=torch.Generator().manual_seed(0))
    assert len(_block_sums(blocks)) == 3
    assert _block_sums(blocks) != _block_sums(blocks[[1, 0, 2]])
    square = blocks[0, :64].view(8, 8)
    assert _block_sums(square.T) == _block_sums(square.T.contiguous()) != _block_sums(square)
    assert _block_sums(blocks[0, 1:6]) == _block_sums(blocks[0, 1:6].clone())  # at an odd place in memory


def test_the_key_knows_what_the_process_computes_with(monkeypatch):
    model = made()
    names = [name_of(model)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            names.append(name_of(model))
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            names.append(name_of(model))
    torch._C._set_mkldnn_enabled(False)  # `mkldnn.flags` touches TF32 too, and warns
    try:
        names.append(name_of(model))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert name_of(model) == names[0]
    monkeypatch.setattr("lightning_em.models.fast.cache_key.STORE_FORMAT", -1)
    names.append(name_of(model))
    assert len(set(names)) == len(names)


def test_adapters_on_one_base_share_their_keys():
    lora = made("lora")
    assert name_of(lora) == name_of(made("vector"))
    with torch.no_grad():
        for parameter in lora.adapter.trainable().values():
            parameter.add_(1)
    assert name_of(lora) == name_of(made("lora_everywhere"))
