import pytest
import torch

from lightning_em.models.fast.packing import (
    PACKED,
    Packing,
    _varlen_applies,
    attend,
    packed_attention,
    packed_inputs,
)
from tests.models.architectures import QUIRKS, build, rows

LENGTHS = (11, 1, 7, 7, 9)


def packing(*lengths, device="cpu"):
    return Packing(lengths, torch.tensor((0, *lengths), device=device).cumsum(0).int())


def packed_logits(model, batch):
    with packed_attention(model):
        return model(**packed_inputs(batch), use_cache=False).logits[0]


def padded_logits(model, batch):
    both = batch.padded()
    logits = model(input_ids=both.input_ids, attention_mask=both.attention_mask, use_cache=False).logits
    return logits[both.attention_mask.bool()]


@pytest.mark.parametrize("name", QUIRKS)
def test_packed_rows_equal_padded_ones(name):
    model, batch = build(name), rows(LENGTHS)
    torch.testing.assert_close(packed_logits(model, batch), padded_logits(model, batch), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", QUIRKS)
def test_a_packed_row_equals_itself_alone(name):
    model, batch = build(name, torch.float64), rows(LENGTHS)
    alone = [packed_logits(model, rows(LENGTHS[:1])), packed_logits(model, batch)[:11]]
    assert torch.equal(rows(LENGTHS[:1]).input_ids, batch.input_ids[:11])
    torch.testing.assert_close(alone[0], alone[1], rtol=1e-9, atol=1e-10)


def test_neighbours_of_one_length_equal_each_alone_to_the_bit():
    """They share a call; a store that is filled row by row must give what a batch gives."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 4 * 9, 16, generator=generator) for heads in (4, 2, 2))
    together, _ = attend(torch.nn.Identity(), query, key, value, None, packing=packing(9, 9, 9, 9))
    parts = zip(*(torch.split(t, 9, dim=2) for t in (query, key, value)), strict=True)
    alone = [attend(torch.nn.Identity(), *part, None, packing=packing(9))[0] for part in parts]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", ["qwen2_window", "mistral", "gemma2", "gemma3", "phi3"])
def test_the_window_is_felt(name):
    """Or the tests above would not see a window that was dropped."""
    wide = {"sliding_window": 100}
    batch = rows(LENGTHS)
    assert not torch.allclose(packed_logits(build(name), batch), packed_logits(build(name, **wide), batch))


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attend_equals_the_formula(window, softcap, key_heads):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    query, key, value = (
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64)
        for heads in (4, key_heads, key_heads)
    )
    got, weights = attend(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        packing=packing(*LENGTHS),
    )
    assert weights is None
    row = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    distance = torch.arange(total)[:, None] - torch.arange(total)[None]
    seen = (row[:, None] == row[None]) & (distance >= 0) & (distance < (window or total))
    key, value = (t.repeat_interleave(4 // key_heads, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    expected = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    # with a soft cap the weights are float32, as in transformers' own
    tolerance = 1e-12 if softcap is None else 1e-6
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=tolerance, atol=tolerance)


def test_no_gradient_crosses_rows():
    query, key, value = (torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3))
    output, _ = attend(torch.nn.Identity(), query, key, value, None, packing=packing(4, 5))
    gradients = torch.autograd.grad(output[:, :4].sum(), (query, key, value))
    assert all((gradient[:, :, 4:] == 0).all() for gradient in gradients)
    assert gradients[2][:, :, :4].abs().sum() > 0


def test_the_models_own_attention_returns_after_an_exception():
    model = build("gemma2")
    before = model.config._attn_implementation
    assert before != PACKED
    with packed_attention(model):
        assert model.config._attn_implementation == PACKED
    assert model.config._attn_implementation == before

    def fail():
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), packed_attention(model):
        fail()
    assert model.config._attn_implementation == before


def test_row_lengths_have_to_cover_the_tokens():
    states = torch.randn(1, 2, 9, 4)
    with pytest.raises(AssertionError, match="do not cover the tokens"):
        attend(torch.nn.Identity(), states, states, states, None, packing=packing(4))
    with pytest.raises(AssertionError, match="needs packed_inputs"):
        attend(torch.nn.Identity(), states, states, states, None)


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_mask_is_made_once_a_pass(name):
    model, batch = build(name), rows((11, 7, 11))
    inputs = packed_inputs(batch)
    with packed_attention(model):
        model(**inputs, use_cache=False)
    masks = inputs["packing"]._masks
    windows = {"gemma2": {6, None}, "mistral": {6}}[name]  # with a soft cap, full attention has its mask too
    assert masks.keys() == {(length, window) for length in (11, 7) for window in windows}
    for (length, window), mask in masks.items():
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        assert torch.equal(mask, (distance >= 0) & (distance < (window or length)))


@pytest.mark.parametrize(
    ("capability", "dtype", "softcap", "applies"),
    [
        ((8, 0), torch.bfloat16, None, True),
        ((9, 0), torch.float16, None, True),
        ((7, 5), torch.float16, None, False),
        ((9, 0), torch.float32, None, False),
        ((9, 0), torch.bfloat16, 50.0, False),
    ],
)
def test_where_the_varlen_kernel_exists(capability, dtype, softcap, applies, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert _varlen_applies(torch.device("cuda"), dtype, softcap) is applies
    assert not _varlen_applies(torch.device("cpu"), dtype, softcap)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_kernel_equals_rows_one_by_one(window):
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(LENGTHS), 64, generator=generator, device="cuda").requires_grad_()
        for heads in (4, 2, 2)
    )
    rows_of_pass = packing(*LENGTHS, device="cuda")
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        states = [t.to(dtype) for t in (query, key, value)]
        output, _ = attend(torch.nn.Identity(), *states, None, sliding_window=window, packing=rows_of_pass)
        results.append(
            [output.float(), *torch.autograd.grad(output.float().square().sum(), (query, key, value))]
        )
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 0.02 * expected.norm()
