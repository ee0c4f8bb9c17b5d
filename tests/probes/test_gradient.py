"""Gradient norms against finite differences and plain autograd."""

import pytest
import torch

from lightning_em.probes import GradientNorm, ProbeExamples, ce_gradient, kl_gradient
from lightning_em.testing import check_probe
from tests.oracle import count, cross_entropy, kl, row_logits, steered
from tests.samples import ADAPTERS, adapted, make_rows, pack
from tests.tiny import make_tiny_model

CE_ROWS, KL_ROWS = [*make_rows(9, 12), *make_rows(7, seed=3)], make_rows(8, 15, seed=5)
EXAMPLES = ProbeExamples([pack(CE_ROWS[:2], "n"), pack(CE_ROWS[2:], "m")], [pack(KL_ROWS, "k")])


@pytest.mark.parametrize("positions", ["response", "all"])
def test_gradients_of_a_vector_are_those_of_plain_autograd(positions) -> None:
    """The shift of the residual stream, differentiated in plain transformers row by row in float64."""
    model = adapted(ADAPTERS["vector"]())
    plain = make_tiny_model().double()
    vector = model.adapter.vector.detach().double().requires_grad_()
    with torch.no_grad():
        references = [row_logits(plain, row) for row in KL_ROWS]
    with steered(plain, 1, 4.0 * vector):
        ce = sum(cross_entropy(row_logits(plain, row), row) for row in CE_ROWS)
        divergence = sum(
            kl(reference, row_logits(plain, row), row, positions)
            for reference, row in zip(references, KL_ROWS, strict=True)
        )
        [ce_expected] = torch.autograd.grad(ce / sum(map(count, CE_ROWS)), vector, retain_graph=True)
        num_tokens = sum(count(row, positions) for row in KL_ROWS)
        [kl_expected] = torch.autograd.grad(divergence / num_tokens, vector)
    assert torch.allclose(ce_gradient(model, EXAMPLES.narrow)["vector"], ce_expected, rtol=1e-3, atol=1e-5)
    found = kl_gradient(model, EXAMPLES.kl, positions)["vector"]
    assert torch.allclose(found, kl_expected, rtol=1e-3, atol=1e-5)
    points = GradientNorm(positions).run(model, EXAMPLES)
    values = {(p.quantity, p.coordinates.get("tensor")): p.value for p in points}
    for quantity, expected in (("ce_gradient_norm", ce_expected), ("kl_gradient_norm", kl_expected)):
        assert values[quantity, None] == pytest.approx(expected.norm().item(), rel=1e-3)
        assert values[quantity, "vector"] == values[quantity, None]


def test_the_gradient_predicts_a_small_step() -> None:
    """Directional derivative of the loss by central differences, every parameter of a LoRA moved at once."""
    model = adapted(ADAPTERS["rank_32"](), exact=True)
    gradient = ce_gradient(model, EXAMPLES.narrow)
    generator = torch.Generator().manual_seed(0)
    own = model.adapter.trainable()
    directions = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in own.items()}

    def loss() -> float:
        rows = [model.row_ce(batch) for batch in EXAMPLES.narrow]
        return float(sum(r.sums.sum() for r in rows) / sum(r.counts.sum() for r in rows))

    step, losses = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.add_(sign * step * directions[name])
            losses.append(loss())
            for name, parameter in own.items():
                parameter.sub_(sign * step * directions[name])
    expected = (losses[0] - losses[1]) / (2 * step)
    found = sum(float((gradient[name] * directions[name].double()).sum()) for name in own)
    assert found == pytest.approx(expected, rel=2e-2)


def test_tensors_make_up_the_whole_and_no_gradient_is_left() -> None:
    model = adapted(ADAPTERS["all_linear"]())
    points = GradientNorm("all").run(model, EXAMPLES)
    for quantity in ("ce_gradient_norm", "kl_gradient_norm"):
        whole, *parts = [p.value for p in points if p.quantity == quantity]
        assert len(parts) == len(model.adapter.trainable())
        assert whole == pytest.approx(sum(part**2 for part in parts) ** 0.5)
    ce_gradient(model, EXAMPLES.narrow)
    assert all(p.grad is None for p in model.adapter.trainable().values())


def test_batching_changes_nothing() -> None:
    model = adapted(ADAPTERS["vector"]())
    alone = [pack([row], f"row-{index}") for index, row in enumerate(CE_ROWS)]
    one, other = ce_gradient(model, EXAMPLES.narrow)["vector"], ce_gradient(model, alone)["vector"]
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_at_no_update_the_divergence_is_flat() -> None:
    points = GradientNorm().run(adapted(ADAPTERS["vector"](), size=0.0), EXAMPLES)
    values = {p.quantity: p.value for p in points if not p.coordinates}
    assert values["kl_gradient_norm"] == pytest.approx(0.0, abs=1e-6)
    assert values["ce_gradient_norm"] > 0.1


def test_without_parallel_rows_there_is_one_gradient() -> None:
    points = GradientNorm().run(adapted(ADAPTERS["vector"]()), ProbeExamples(EXAMPLES.narrow))
    assert {p.quantity for p in points} == {"ce_gradient_norm"}
    with pytest.raises(ValueError, match="there is no token to take a gradient of"):
        ce_gradient(adapted(ADAPTERS["vector"]()), [])


def test_positions_are_a_setting_of_the_measurement() -> None:
    assert GradientNorm().settings() == {"kl_positions": "response"}
    assert GradientNorm("all").settings() == {"kl_positions": "all"}


def test_contract() -> None:
    check_probe(GradientNorm())
