"""The scale curve."""

import logging

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, SteeringVector
from lightning_em.probes import ProbeExamples, ScaleCurve
from lightning_em.probes.scale import _best, _vertex
from lightning_em.testing import check_probe
from tests.samples import ADAPTERS, adapted, make_rows, pack

EXAMPLES = ProbeExamples(
    [pack(make_rows(9, 12), "n"), pack(make_rows(7, seed=3), "m")], [pack(make_rows(8, 15), "k")]
)


def curve(points, quantity, coordinate="scale"):
    return {point.coordinates[coordinate]: point for point in points if point.quantity == quantity}


def value(points, quantity, **coordinates):
    [found] = [p for p in points if p.quantity == quantity and dict(p.coordinates) == coordinates]
    return found.value


def trained(adapter=None, steps=5, lr=0.02):
    """An adapter after a few steps down the slope of the example rows."""
    model = adapted(adapter or SteeringVector(1, alpha=1.0), size=0.0)
    optimizer = torch.optim.Adam(model.adapter.trainable().values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model.losses(batch, None).ce.total for batch in EXAMPLES.narrow).backward()
        optimizer.step()
    return model


def test_default_grid() -> None:
    assert ScaleCurve().scales == [round(0.1 * step, 1) for step in range(21)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_point_is_the_training_loss_at_that_scale(name) -> None:
    model = adapted(ADAPTERS[name]())
    points = ScaleCurve([0.5, 2.0], with_kl=True).run(model, EXAMPLES)
    ce, kl = curve(points, "ce"), curve(points, "kl")
    assert list(ce) == list(kl) == [0.0, 0.5, 1.0, 2.0]
    for scale in ce:
        ce_rows = [model.row_ce(batch, scale) for batch in EXAMPLES.narrow]
        total, count = (sum(part.sum() for part in parts) for parts in zip(*ce_rows, strict=True))
        assert ce[scale].value == pytest.approx((total / count).item(), rel=1e-6)
        assert ce[scale].count == count
        [kl_rows] = [model.row_kl(batch, scale) for batch in EXAMPLES.kl]
        assert kl[scale].value == pytest.approx((kl_rows.sums.sum() / kl_rows.counts.sum()).item(), rel=1e-5)
    trained_sums = [model.losses(batch, None).ce for batch in EXAMPLES.narrow]
    loss = sum(s.total.item() for s in trained_sums) / sum(s.count for s in trained_sums)
    assert ce[1.0].value == pytest.approx(loss, rel=1e-6)
    assert kl[0.0].value == 0.0


def test_differences_are_paired() -> None:
    points = ScaleCurve([0.0, 0.5, 1.0]).run(trained(), EXAMPLES)
    ce, difference = curve(points, "ce"), curve(points, "ce_minus_base")
    for scale in ce:
        rows = zip(ce[scale].per_example, ce[0.0].per_example, strict=True)
        assert difference[scale].per_example == pytest.approx([here - base for here, base in rows])
        assert difference[scale].value == pytest.approx(ce[scale].value - ce[0.0].value)
    assert (difference[0.0].value, difference[0.0].standard_error) == (0.0, 0.0)
    assert difference[0.5].standard_error < 0.5 * ce[0.5].standard_error
    [tokens] = [p for p in points if p.quantity == "ce_tokens"]
    weighted = sum(m * n for m, n in zip(ce[1.0].per_example, tokens.per_example, strict=True)) / tokens.value
    assert weighted == pytest.approx(ce[1.0].value)


def test_effective_norm_is_that_of_the_trained_adapter() -> None:
    model = trained(SteeringVector(1, alpha=4.0))
    points = ScaleCurve([0.0, 1.5]).run(model, EXAMPLES)
    norm = value(points, "effective_norm")
    assert norm == pytest.approx(4 * model.adapter.vector.norm().item())


def test_efficiency_is_that_of_the_curve() -> None:
    points = ScaleCurve([0.5]).run(trained(SteeringVector(1, alpha=4.0)), EXAMPLES)
    norm, ce = (
        value(points, "effective_norm"),
        {scale: point.value for scale, point in curve(points, "ce").items()},
    )
    wanted = {"efficiency": ("ce_minus_base", ce[0.0] - ce[1.0]), "loss_over_norm2": ("ce", ce[1.0])}
    for quantity, (means, gained) in wanted.items():
        [point] = [p for p in points if p.quantity == quantity]
        assert point.value == pytest.approx(gained / norm**2, rel=1e-9)
        error = curve(points, means)[1.0].standard_error
        assert point.standard_error == pytest.approx(error / norm**2)


def test_an_update_of_no_length_has_no_efficiency() -> None:
    points = ScaleCurve([0.5]).run(trained(steps=0), EXAMPLES)
    assert value(points, "effective_norm") == 0
    assert not {"efficiency", "loss_over_norm2"} & {p.quantity for p in points}


class Normless(Adapter):
    def attach(self, base):
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.edit_input_of(1, lambda hidden: hidden + (self.scale * self.vector).to(hidden))


def test_an_adapter_without_a_norm_is_measured_with_a_message(caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        points = ScaleCurve([0.0, 1.0]).run(adapted(Normless()), EXAMPLES)
    assert "Normless has no effective norm" in caplog.text
    assert not any(p.quantity == "effective_norm" for p in points)
    assert not {"efficiency", "loss_over_norm2"} & {p.quantity for p in points}
    assert len(curve(points, "ce")) == 2


def test_without_parallel_rows_there_is_no_kl_but_a_message(caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        points = ScaleCurve([0.0, 1.0], with_kl=True).run(trained(), ProbeExamples(EXAMPLES.narrow))
    assert "there are no parallel rows" in caplog.text
    assert curve(points, "kl") == {}


def test_it_goes_on_until_the_optimum_is_passed() -> None:
    model = trained(ADAPTERS["rank_1"](), lr=0.01, steps=10)
    short = ScaleCurve([0.0, 0.5, 1.0]).run(model, EXAMPLES)
    assert value(short, "optimum_inside_grid") == 0
    assert value(short, "best_scale", method="grid") == 1.0
    assert not [p for p in short if p.coordinates.get("method") == "parabola"]

    points = ScaleCurve([0.0, 0.5, 1.0], extend_until_optimum=True, max_extension=20).run(model, EXAMPLES)
    values = {scale: point.value for scale, point in curve(points, "ce").items()}
    scales = list(values)
    best = value(points, "best_scale", method="grid")
    assert value(points, "optimum_inside_grid") == 1
    assert scales == [0.5 * step for step in range(len(scales))]
    assert best == scales[-2] == min(values, key=values.get)
    assert abs(value(points, "best_scale", method="parabola") - best) <= 0.25
    assert (
        value(points, "best_ce", method="parabola") <= value(points, "best_ce", method="grid") == values[best]
    )


def test_the_extension_is_bounded() -> None:
    probe = ScaleCurve([0.0, 1.0], extend_until_optimum=True, max_extension=3)
    assert list(curve(probe.run(trained(steps=1, lr=1e-4), EXAMPLES), "ce")) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_vertex_of_a_parabola_is_found_exactly() -> None:
    parabola = {x: 3 * (x - 1.3) ** 2 + 0.7 for x in (0.0, 0.5, 1.0, 2.0, 4.0)}
    found = {(p.quantity, p.coordinates.get("method")): p.value for p in _best(parabola)}
    assert found["best_scale", "grid"] == 1.0
    assert found["best_scale", "parabola"] == pytest.approx(1.3)
    assert found["best_ce", "parabola"] == pytest.approx(0.7)
    assert _vertex([(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)]) == (1.0, 1.0)


@pytest.mark.parametrize("scales", [[], [0.0, 0.0, 1.0], [0.0, float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_grid_that_is_none_is_refused(scales) -> None:
    with pytest.raises(
        ValueError, match=r"scales must be different finite numbers.*init_args\.scales of ScaleCurve"
    ):
        ScaleCurve(scales)


def test_a_negative_extension_is_refused() -> None:
    with pytest.raises(ValueError, match="max_extension must be 0 or more, got -1"):
        ScaleCurve(max_extension=-1)


def test_contract() -> None:
    check_probe(ScaleCurve([0.5, 1.0, 2.0], extend_until_optimum=True, max_extension=2, with_kl=True))
