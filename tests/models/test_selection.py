"""Models that the fast backend, or packed rows, would get wrong: each gives the plain numbers, and one line."""

import logging
import types
from functools import partial

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lightning_em.adapters import SteeringVector
from lightning_em.batch import single_rows
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions
from lightning_em.models.fast import FastBackend, FastOptions
from lightning_em.models.plain import PlainBackend
from tests.models.architectures import LAYERS, build, rows
from tests.models.test_engine import CE, KL, made, measured
from tests.oracle import cross_entropy, row_logits


def test_an_unlisted_architecture_falls_back_with_one_line(caplog):
    config = OPTConfig(
        vocab_size=67,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        model = AdaptedModel(OPTForCausalLM(config), SteeringVector(1, alpha=1.0))
    (line,) = caplog.messages
    assert "plain backend" in line
    assert "model type opt is not on the verified list" in line
    assert model.losses(CE, KL).kl.total == 0


def test_a_head_with_hooks_falls_back():
    base = build("qwen2")
    base.lm_head.register_forward_hook(lambda *_: None)
    assert isinstance(AdaptedModel(base, SteeringVector(1)).backend, PlainBackend)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 8.0, 16.0],
    "original_max_position_embeddings": 8,
    "rope_theta": 10000.0,
    "factor": 16.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROTARY = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "longrope in some layers": (
        "gemma3",
        {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": PLAIN_ROPE}},
    ),
    "dynamic in some layers": (
        "gemma3",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": PLAIN_ROPE},
            "max_position_embeddings": 8,
        },
    ),
    "longrope with a factor by side": (
        "phimoe",
        {"rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.6}},
    ),
}


@pytest.mark.parametrize(
    "backend", ["plain", "auto", FastOptions(packed=False), FastOptions(part_tokens=8)], ids=str
)
@pytest.mark.parametrize("kind", ROTARY)
def test_with_rotary_embeddings_that_depend_on_the_length_a_row_has_the_loss_it_has_alone(
    kind, backend, caplog
):
    name, fields = ROTARY[kind]
    batch = rows((6, 12, 5, 20, 8, 9), seed=1)  # both sides of 8
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        model = made(base=build(name, torch.float64, **fields), backend=backend)
    if backend != "plain":
        (line,) = [record.message for record in caplog.records if record.name.startswith("lightning_em")]
        reason = f"its rotary embedding ({kind.split()[0]}) depends on the longest row of a batch"
        expected = "model type phimoe is not on the verified list" if name == "phimoe" else reason
        assert line == f"plain backend (several times slower): {expected}"
    model.row_ce(rows((30,)))  # `dynamic` keeps the frequencies of the longest input so far
    for scale in (0.0, 1.0):
        together = model.row_ce(batch, scale).sums
        alone = [
            made(base=build(name, torch.float64, **fields), backend="plain").row_ce(row, scale).sums
            for row in single_rows(batch)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=0)
    oracles = [
        cross_entropy(row_logits(build(name, torch.float64, **fields), pair), pair)
        for row in single_rows(batch)
        if (pair := (row.input_ids.tolist(), row.response_mask.tolist()))
    ]
    torch.testing.assert_close(model.row_ce(batch, 0.0).sums, torch.stack(oracles), rtol=1e-10, atol=0)
    sums = model.losses(batch, batch)
    (gradient,) = torch.autograd.grad(sums.ce.total + sums.kl.total, [model.adapter.vector])
    parts = []
    for row in single_rows(batch):
        single = model.losses(row, row)
        parts.append(torch.autograd.grad(single.ce.total + single.kl.total, [model.adapter.vector])[0])
    torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-8, atol=1e-12)
    padded = batch.padded()
    logits = build(name, torch.float64, **fields)(**padded._asdict(), use_cache=False).logits
    one_pass = cross_entropy(logits[0, :6], (batch.input_ids[:6].tolist(), batch.response_mask[:6].tolist()))
    assert abs(one_pass - oracles[0]) > 1e-4  # or nothing would have been at stake


@pytest.mark.parametrize(
    ("kind", "lengths", "passes"),
    [
        ("longrope", (6, 5, 8), 1),
        ("longrope", (9, 12, 20), 1),
        ("longrope", (6, 12, 5, 20), 2),
        ("dynamic", (6, 5, 8), 1),
        ("dynamic", (6, 12, 12, 20), 3),
    ],
)
def test_rows_with_the_same_frequencies_share_a_pass(kind, lengths, passes):
    name, fields = ROTARY[kind]
    model, shapes = made(base=build(name, **fields), backend="plain"), []
    model.base.model.layers[0].register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    logits = model.logits(rows(lengths))
    assert len(logits) == sum(lengths)
    assert len(shapes) == passes
    assert sum(count for count, _ in shapes) == len(lengths)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "granite"])
def test_ordinary_rotary_embeddings_take_the_fast_one(name):
    assert isinstance(made(name).backend, FastBackend)


class OwnLlama(LlamaForCausalLM):
    """Code from elsewhere under a listed model type, as `trust_remote_code` brings it."""


def test_code_from_elsewhere_takes_the_plain_path(caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        model = made(base=OwnLlama(build("llama").config))
    (line,) = caplog.messages
    assert (
        f"plain backend (several times slower): the model's code is not that of transformers but of {__name__}"
        in line
    )
    assert isinstance(model.backend, PlainBackend)


def own_attention(self, hidden_states, position_embeddings, attention_mask=None, **_):
    """Attention that asks nobody how, as old remote code does."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        project(hidden_states).view(shape).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
    )
    return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


def with_own_attention(layers):
    base = build("llama", torch.float64)
    for layer in layers:
        attention = base.model.layers[layer].self_attn
        attention.forward = types.MethodType(own_attention, attention)
    return base


@pytest.mark.parametrize("options", [{}, {"store": StoreOptions(), "reference": "cached"}], ids=str)
@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 2, 3]], ids=str)
def test_attention_that_looks_across_rows_gets_padded_ones(layers, options, caplog):
    expected, expected_gradient, _ = measured(made(base=with_own_attention(layers), backend="plain"))
    if options:
        options = options | {"store": ActivationStore(options["store"])}
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        model = made(base=with_own_attention(layers), **options)
        for _ in range(2):
            values, gradient, _ = measured(model)
            assert (values - expected).abs().max() <= 1e-10 * expected.abs().max()
            assert (gradient - expected_gradient).norm() <= 1e-10 * expected_gradient.norm()
    (line,) = caplog.messages
    assert line.startswith(f"padded rows instead of packed ones (slower): {len(layers)} of 4 layers compute")
    assert not model.backend.hidden.packed


def test_the_first_sweep_joins_no_batches_that_turn_out_to_be_padded():
    model, shapes = made(base=with_own_attention([3])), []
    model.base.model.layers[-1].register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    model.sweep_row_ce([CE, KL], [partial(model.adapter.at_scale, 1.0)])
    assert shapes[-2:] == [(3, 11), (2, 12)]


def test_eager_attention_asked_for_is_kept(caplog):
    calls = []
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        base = build("llama", attn_implementation="eager")
        model = made(base=base)
    assert caplog.messages == [
        "padded rows instead of packed ones (slower): the model's attention is set to eager",
        "fast backend: split at layer 2 of 4",
    ]
    for layer in base.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: calls.append(out[1]))
    values, gradient, _ = measured(model)
    assert all(weights is not None for weights in calls)  # sdpa gives none
    expected, expected_gradient, _ = measured(made("llama", backend="plain"))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    caplog.clear()
    made("gemma2")  # whose own it is
    made(base=build("llama", attn_implementation="eager"), backend=FastOptions(packed=False))
    assert caplog.messages == []


@pytest.mark.parametrize("backend", ["plain", FastOptions(packed=False)], ids=str)
def test_padding_beyond_a_sliding_window_is_not_nan_in_float64(backend):
    """transformers computes the softmax of eager attention in float32, where the lowest float64 is -inf."""
    batch = rows((4, 30), seed=1)  # padding of 26 tokens, a window of 6
    single, double = build("gemma2"), build("gemma2").double()
    double.config.dtype = torch.float64
    padded = batch.padded()
    assert double(**padded._asdict(), use_cache=False).logits[0, :4].isnan().any()
    found, expected = (made(base=base, backend=backend) for base in (double, single))
    for scale in (0.0, 1.0):
        torch.testing.assert_close(
            found.row_ce(batch, scale).sums, expected.row_ce(batch, scale).sums, rtol=1e-4, atol=0
        )
    torch.testing.assert_close(found.row_kl(batch).sums, expected.row_kl(batch).sums, rtol=1e-3, atol=0)
