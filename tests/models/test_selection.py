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
from lightning_em.batch import concat, single_rows
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions
from lightning_em.models.fast import FastBackend, FastOptions
from lightning_em.models.plain import PlainBackend
from tests.models.architectures import LAYERS, build, rows
from tests.models.test_engine import ADAPTERS, CE, KL, made, measured, moved


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


ROTARY = {
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 3.0, 8.0, 16.0],
                "original_max_position_embeddings": 8,
                "rope_theta": 10000.0,
                "factor": 16.0,
            },
            "original_max_position_embeddings": 8,
        },
    ),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
            "max_position_embeddings": 8,
        },
    ),
}


@pytest.mark.parametrize("backend", ["auto", FastOptions(packed=False), FastOptions(part_tokens=8)], ids=str)
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_embeddings_that_depend_on_the_longest_row_take_the_plain_path(kind, backend, caplog):
    name, fields = ROTARY[kind]
    short, long = rows((6, 5), seed=1), rows((12, 9), seed=2)  # either side of 8, and a batch across it
    for ce, kl in ((short, long), (long, short), (concat([short, long]), short)):
        found = []
        for each in ("plain", backend):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="lightning_em"):
                model = moved(AdaptedModel(build(name, **fields), ADAPTERS["vector"](name), backend=each))
            sums = model.losses(ce, kl)
            (gradient,) = torch.autograd.grad(sums.ce.total + sums.kl.total, [model.adapter.vector])
            found.append((sums.ce.total, sums.kl.total, gradient))
        (line,) = caplog.messages
        assert (
            f"plain backend (several times slower): its rotary embedding ({kind}) depends on the longest"
            in line
        )
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    alone = torch.cat([made(base=build(name, **fields)).row_ce(row).sums for row in single_rows(ce)])
    together = made(base=build(name, **fields)).row_ce(ce).sums
    assert not torch.allclose(alone, together, rtol=1e-4)  # or nothing would have been at stake


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
