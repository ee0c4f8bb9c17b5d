"""A step's weighted loss, of both streams in one tuned pass where they are short, is that of the two sums."""

import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.losses import LossWeights
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions
from lightning_em.models.fast import FastOptions
from tests.models.architectures import QUIRKS, build, rows
from tests.models.test_engine import CE, KL, OPTIONS, POSITIONS, full_logits, made

WEIGHTS = LossWeights(1.0, 3.7)  # as in `measured`


def stepped(model, kl_positions="response", ce=CE, kl=KL):
    """The two sums and the gradient of their weighted sum, as `measured` gives them."""
    loss = model.step_loss(ce, kl, WEIGHTS, kl_positions)
    gradients = torch.autograd.grad(loss.total, list(model.adapter.trainable().values()))
    values = torch.stack([loss.ce.total, loss.kl.total]).double()
    return values, torch.cat([gradient.flatten().double() for gradient in gradients]), loss


def assert_same(model, expected, expected_gradient, sums, kl_positions="response", tolerance=1e-10):
    values, gradient, loss = stepped(model, kl_positions)
    assert (values - expected).abs().max() <= tolerance * expected.abs().max()
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    assert (loss.ce.count, loss.kl.count) == (sums.ce.count, sums.kl.count)
    assert loss.total.item() == pytest.approx(values[0].item() + 3.7 * values[1].item(), rel=1e-9)
    assert not loss.ce.total.requires_grad
    assert not loss.kl.total.requires_grad


@pytest.mark.parametrize(("adapter", "kl_positions"), POSITIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_combination_equals_full_logits_in_float64(options, adapter, kl_positions):
    model = made(adapter=adapter, backend=options, dtype=torch.float64)
    assert_same(model, *full_logits("qwen2", adapter, kl_positions), kl_positions)


@pytest.mark.parametrize("reference", [None, "live", "cached"])
@pytest.mark.parametrize("name", QUIRKS)
def test_every_architecture_with_and_without_a_store(name, reference):
    store = {} if reference is None else {"store": ActivationStore(StoreOptions()), "reference": reference}
    model = made(name, dtype=torch.float64, **store)
    for _ in range(2):  # cold, then warm
        assert_same(model, *full_logits(name))


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("gpu", [True, False])
def test_which_streams_share_a_tuned_pass(gpu, reference, monkeypatch):
    """A live reference has the tuned pass's shape, or their rounding would differ and KL 0 not be 0."""
    monkeypatch.setattr("lightning_em.models.fast.backend._waits_for_launches", lambda batch: gpu)
    store = ActivationStore(StoreOptions())
    model, shapes = made(dtype=torch.float64, store=store, reference=reference), []
    model.losses(CE, KL)  # the store is filled
    model.base.model.layers[-1].register_forward_hook(
        lambda _, __, out: shapes.append((out.shape[1], torch.is_grad_enabled()))
    )
    assert_same(model, *full_logits())
    ce, kl = sum(CE.lengths), sum(KL.lengths)
    together = [] if reference == "cached" else [(ce + kl, False)]
    apart = [(ce, True), (kl, False), (kl, True)]
    assert shapes == ([*together, (ce + kl, True)] if gpu or reference == "cached" else apart)
    monkeypatch.setattr("lightning_em.models.fast.backend.CONCAT_TOKENS", ce + kl - 1)
    shapes.clear()
    assert_same(model, *full_logits())
    assert sorted(size for size, tracked in shapes if tracked) == sorted([ce, kl]), "long streams take two"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_an_adapter_the_kl_is_exactly_zero_in_a_wide_model_too(dtype):
    """Narrow ones round alike in any shape."""
    base = build("llama", dtype, hidden_size=512, intermediate_size=768)
    model = AdaptedModel(base, SteeringVector(1))
    for seed in range(4):
        narrow, parallel = rows((61, 57, 90), seed), rows((80, 33), seed + 9)
        assert model.step_loss(narrow, parallel, WEIGHTS).kl.total == 0


def test_a_stream_without_rows_and_one_without_kl():
    model = made(dtype=torch.float64)
    values, _, loss = stepped(model, ce=CE.dummy())
    assert (loss.ce.count, values[0]) == (0, 0)
    alone = model.step_loss(CE, None, WEIGHTS)
    assert alone.kl is None
    assert alone.total.item() == pytest.approx(model.losses(CE, None).ce.total.item())


def test_ranks_that_share_the_base_take_as_many_passes_as_each_other():
    """A rank with short rows would otherwise leave the others waiting."""
    model, calls = made(), []
    model.use_lockstep(lambda count: max(count, 2))
    model.base.model.layers[-1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stepped(model)
    assert calls.count(True) == 4


def test_nothing_is_differentiated_without_gradients():
    model = made(backend=FastOptions())
    with torch.no_grad():
        loss = model.step_loss(CE, KL, WEIGHTS)
    assert not loss.total.requires_grad
    assert loss.ce.total == pytest.approx(model.losses(CE, KL).ce.total.item(), rel=1e-5)
