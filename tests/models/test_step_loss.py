"""A step's weighted loss, of both streams in one tuned pass where they are short, is that of the two sums."""

import pytest
import torch

from lightning_em.models import ActivationStore, LossWeights, StoreOptions
from lightning_em.models.engine import EngineOptions
from tests.models.architectures import QUIRKS
from tests.models.test_engine import ADAPTERS, CE, KL, OPTIONS, made, measured

WEIGHTS = LossWeights(1.0, 4.0)  # powers of two, as in `measured`


def stepped(model, kl_positions="response", ce=CE, kl=KL):
    """The two sums and the gradient of their weighted sum, as `measured` gives them."""
    loss = model.step_loss(ce, kl, WEIGHTS, kl_positions)
    gradients = torch.autograd.grad(loss.total, list(model.adapter.trainable().values()))
    values = torch.stack([loss.ce.total, loss.kl.total]).double()
    return values, torch.cat([gradient.flatten().double() for gradient in gradients]), loss


def assert_same(model, other, kl_positions="response", tolerance=1e-10):
    values, gradient, loss = stepped(model, kl_positions)
    expected, expected_gradient, sums = measured(other, kl_positions)
    assert (values - expected).abs().max() <= tolerance * expected.abs().max()
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    assert (loss.ce.count, loss.kl.count) == (sums.ce.count, sums.kl.count)
    assert loss.total.item() == pytest.approx(values[0].item() + 4 * values[1].item(), rel=1e-9)
    assert not loss.ce.total.requires_grad
    assert not loss.kl.total.requires_grad


@pytest.mark.parametrize("kl_positions", ["response", "all"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_combination_equals_full_logits_in_float64(adapter, options, kl_positions):
    plain = made(adapter=adapter, engine="plain", dtype=torch.float64)
    assert_same(made(adapter=adapter, engine=options, dtype=torch.float64), plain, kl_positions)


@pytest.mark.parametrize("reference", [None, "live", "cached"])
@pytest.mark.parametrize("name", QUIRKS)
def test_every_architecture_with_and_without_a_store(name, reference):
    store = {} if reference is None else {"store": ActivationStore(StoreOptions()), "reference": reference}
    model = made(name, dtype=torch.float64, **store)
    for _ in range(2):  # cold, then warm
        assert_same(model, made(name, engine="plain", dtype=torch.float64))


def test_short_streams_take_one_tuned_pass_and_long_ones_two(monkeypatch):
    model, calls = made(), []
    model.base.model.layers[-1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stepped(model)
    assert calls.count(True) == 1
    monkeypatch.setattr("lightning_em.models.adapted.JOINED_TOKENS", sum(CE.lengths) + sum(KL.lengths) - 1)
    stepped(model)
    assert calls.count(True) == 1 + 2


@pytest.mark.parametrize("reference", [None, "live", "cached"])
def test_on_a_gpu_the_live_reference_takes_the_shape_of_the_tuned_pass(reference, monkeypatch):
    """Or their rounding would differ, and with it the KL of an adapter without effect from 0."""
    monkeypatch.setattr("lightning_em.models.passes._rounds_by_shape", lambda batch: True)
    store = {} if reference is None else {"store": ActivationStore(StoreOptions()), "reference": reference}
    model, shapes = made(dtype=torch.float64, **store), []
    model.row_ce(CE)
    model.base.model.layers[-1].register_forward_hook(lambda _, __, out: shapes.append(out.shape[1]))
    assert_same(model, made(engine="plain", dtype=torch.float64))
    tuned, rows_alone = sum(CE.lengths) + sum(KL.lengths), list(KL.lengths)
    assert shapes == [*(rows_alone if reference == "cached" else [tuned]), tuned]


def test_a_stream_without_rows_and_one_without_kl():
    model = made(dtype=torch.float64)
    values, _, loss = stepped(model, ce=CE.ghost())
    assert (loss.ce.count, values[0]) == (0, 0)
    alone = model.step_loss(CE, None, WEIGHTS)
    assert alone.kl is None
    assert alone.total.item() == pytest.approx(model.losses(CE, None).ce.total.item())


def test_ranks_that_share_the_base_take_as_many_passes_as_each_other():
    """A rank with short rows would otherwise leave the others waiting."""
    model, calls = made(), []
    model.compute_in_step(lambda count: max(count, 2))
    model.base.model.layers[-1].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    stepped(model)
    assert calls.count(True) == 4


def test_nothing_is_differentiated_without_gradients():
    model = made(engine=EngineOptions())
    with torch.no_grad():
        loss = model.step_loss(CE, KL, WEIGHTS)
    assert not loss.total.requires_grad
    assert loss.ce.total == pytest.approx(model.losses(CE, KL).ce.total.item(), rel=1e-5)
