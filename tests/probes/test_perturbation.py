"""The perturbation curve."""

import logging
import math
import statistics

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LowRank, SteeringVector
from lightning_em.probes import PerturbationCurve, ProbeExamples
from lightning_em.testing import check_probe
from tests.probes.test_scale import EXAMPLES, trained, value
from tests.samples import ADAPTERS, adapted

GRID = [0.1, 0.5, 1.0]


def points_of(model, strengths=GRID, num_seeds=3, seed=0, examples=EXAMPLES):
    return PerturbationCurve(strengths, num_seeds, seed).run(model, examples)


def test_default_grid() -> None:
    assert PerturbationCurve().settings() == {
        "strengths": [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        "num_seeds": 10,
        "seed": 0,
    }


def test_both_definitions_of_stability() -> None:
    points = points_of(trained(lr=0.1))
    base, unmoved = value(points, "ce_base"), value(points, "ce", strength=0.0)
    assert unmoved < base
    for e in GRID:
        moved = [value(points, "ce", strength=e, noise=noise) for noise in range(3)]
        expected = {
            "ce": moved,
            "ce_increase": [m - unmoved for m in moved],
            "lost_gain": [100 * (m - unmoved) / (base - unmoved) for m in moved],
            "relative_increase": [(m - unmoved) / unmoved for m in moved],
        }
        for quantity, values in expected.items():
            assert value(points, f"{quantity}_mean", strength=e) == pytest.approx(statistics.mean(values))
            assert value(points, f"{quantity}_sd", strength=e) == pytest.approx(statistics.stdev(values))
    [summary] = [p for p in points if p.quantity == "lost_gain_mean" and p.coordinates["strength"] == 0.5]
    assert (summary.unit, summary.count) == ("percent", 3)
    assert summary.standard_error == pytest.approx(value(points, "lost_gain_sd", strength=0.5) / 3**0.5)


def test_increases_are_paired_over_rows() -> None:
    points = points_of(trained())
    unmoved = next(p for p in points if p.quantity == "ce" and p.coordinates["strength"] == 0.0)
    increases = [p for p in points if p.quantity == "ce_increase"]
    assert len(increases) == len(GRID) * 3
    for point in increases:
        moved = next(p for p in points if p.quantity == "ce" and p.coordinates == point.coordinates)
        pairs = zip(moved.per_example, unmoved.per_example, strict=True)
        assert point.per_example == pytest.approx([a - b for a, b in pairs])


def test_noise_is_the_same_in_every_run_and_on_every_grid() -> None:
    model = trained()
    first, second = points_of(model), points_of(model, strengths=[0.5], num_seeds=5)
    for noise in range(3):
        here = value(first, "ce", strength=0.5, noise=noise)
        assert here == value(second, "ce", strength=0.5, noise=noise)
    other = points_of(model, seed=1)
    assert value(other, "ce", strength=0.5, noise=0) != value(first, "ce", strength=0.5, noise=0)
    assert len({value(second, "ce", strength=0.5, noise=noise) for noise in range(5)}) == 5


def test_noise_is_the_same_for_another_batching_of_the_rows() -> None:
    model = trained()
    regrouped = ProbeExamples(list(reversed(EXAMPLES.narrow)))
    one, two = points_of(model), points_of(model, examples=regrouped)
    for e in GRID:
        wanted = value(one, "ce_mean", strength=e)
        assert value(two, "ce_mean", strength=e) == pytest.approx(wanted, rel=1e-6)


def test_the_trained_scale_is_measured_whatever_the_adapter_is_set_to() -> None:
    model = trained()
    wanted = points_of(model)
    with model.adapter.at_scale(0.0):
        assert points_of(model) == wanted


@pytest.mark.parametrize("name", ["vector", "rank_1"])
def test_an_untrained_adapter_has_no_gain_to_lose(name, caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        points = points_of(adapted(ADAPTERS[name](), size=0.0))
    assert "not better than the base" in caplog.text
    assert not any(p.quantity.startswith("lost_gain") for p in points)
    assert value(points, "ce_increase_mean", strength=1.0) == pytest.approx(0.0, abs=1e-6)


def test_full_strength_replaces_a_vector_by_noise() -> None:
    """At e = 1 the direction is gone: the loss is that of a random vector of equal norm."""
    model = trained(lr=0.1)
    points = points_of(model, num_seeds=8)
    losses = []
    vector = model.adapter.vector
    kept, generator = vector.detach().clone(), torch.Generator().manual_seed(9)
    for _ in range(8):
        noise = torch.randn(kept.shape, generator=generator)
        vector.data.copy_(kept.norm() * noise / noise.norm())
        rows = [model.row_ce(batch) for batch in EXAMPLES.narrow]
        losses.append(sum(r.sums.sum() for r in rows) / sum(r.counts.sum() for r in rows))
    spread = statistics.stdev(map(float, losses))
    assert abs(value(points, "ce_mean", strength=1.0) - statistics.mean(map(float, losses))) < 3 * spread


@pytest.mark.parametrize("alpha", [0.5, 1.0, 256.0])
def test_a_vector_is_displaced_by_the_chord_of_its_turn(alpha) -> None:
    """||x' - x|| = sqrt(2 - 2 sqrt(1 - e^2)) ||x||, whatever the noise."""
    model = adapted(SteeringVector(1, alpha=alpha))
    points = points_of(model)
    for e in GRID:
        chord = math.sqrt(2 - 2 * math.sqrt(1 - e**2)) * alpha * model.adapter.vector.norm().item()
        for noise in range(3):
            assert value(points, "displacement", strength=e, noise=noise) == pytest.approx(chord, rel=1e-5)
        assert value(points, "displacement_mean", strength=e) == pytest.approx(chord, rel=1e-5)
        assert value(points, "displacement_sd", strength=e) == pytest.approx(0.0, abs=1e-5 * chord)
    assert {p.unit for p in points if p.quantity.startswith("displacement")} == {"norm"}


class Shift(Adapter):
    """A user's own, which declares its low-rank parts."""

    def attach(self, base):
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.edit_input_of(self.resolve(base, 1), lambda h: h + (3 * self.scale * self.vector).to(h))

    def update(self):
        return [LowRank(self.lowest_layer, "vector", factor=3.0)]


class OnlyNorm(Shift):
    """Has a norm, which is no distance between two updates."""

    def update(self):
        return None

    def effective_norm(self):
        return 3 * self.vector.norm()


class Normless(Shift):
    def update(self):
        return None


class Product(Adapter):
    """A low rank with the norm of the product: at the difference of the factors it is no distance."""

    def attach(self, base):
        self.down = nn.Parameter(torch.zeros(2, base.config.hidden_size))
        self.up = nn.Parameter(torch.zeros(base.config.hidden_size, 2))
        self.edit_input_of(self.resolve(base, 1), self.edit)

    def edit(self, hidden):
        return hidden + (self.scale * hidden.float() @ self.down.T @ self.up.T).to(hidden)

    def effective_norm(self):
        return (self.up @ self.down).norm()


def test_an_adapter_of_ones_own_is_displaced_if_it_declares_its_parts(caplog) -> None:
    model = adapted(Shift())
    chord = math.sqrt(2 - math.sqrt(3)) * model.adapter.effective_norm().item()
    points = points_of(model, strengths=[0.5])
    assert value(points, "displacement_mean", strength=0.5) == pytest.approx(chord, rel=1e-5)
    for kind in (OnlyNorm, Normless, Product):
        with caplog.at_level(logging.INFO, "lightning_em.probes"):
            caplog.clear()
            points = points_of(adapted(kind()))
        assert caplog.text.count(f"{kind.__name__} does not tell how far two of its updates are apart") == 1
        assert not any(p.quantity.startswith("displacement") for p in points)
        assert value(points, "ce_increase_mean", strength=1.0) != 0


def test_an_untrained_adapter_is_not_displaced() -> None:
    for name in ("vector", "rank_1"):
        points = points_of(adapted(ADAPTERS[name](), size=0.0))
        assert {p.value for p in points if p.quantity.startswith("displacement")} == {0.0}


def test_one_seed_has_no_deviation() -> None:
    points = points_of(trained(), num_seeds=1)
    assert not any(p.quantity.endswith("_sd") for p in points)
    assert all(p.standard_error is None for p in points if p.quantity.endswith("_mean"))


@pytest.mark.parametrize("strengths", [[], [0.0, 0.5], [1.5], [-0.1]])
def test_strengths_outside_zero_to_one_are_refused(strengths) -> None:
    with pytest.raises(ValueError, match=r"strengths must lie above 0 and not above 1.*PerturbationCurve"):
        PerturbationCurve(strengths)


def test_no_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="num_seeds must be 1 or more and seed not negative, got 0 and 0"):
        PerturbationCurve(num_seeds=0)


def test_contract() -> None:
    check_probe(PerturbationCurve([0.1, 1.0], num_seeds=2))
    check_probe(PerturbationCurve([0.5], num_seeds=1), trained(SteeringVector(2)), EXAMPLES)
    check_probe(PerturbationCurve([0.5], num_seeds=1), trained(ADAPTERS["all_linear"]()), EXAMPLES)


def test_noise_on_a_subset_is_paired_on_it_and_moves_from_the_loss_of_all_rows() -> None:
    model = trained(lr=0.1)
    points = PerturbationCurve(GRID, 3, 0, noise_examples=2).run(model, EXAMPLES)
    everything = points_of(model)
    for name, place in (("ce_base", {}), ("ce", {"strength": 0.0}), ("ce_tokens", {})):
        assert value(points, name, **place) == pytest.approx(value(everything, name, **place), rel=1e-6)
    unmoved = value(points, "ce", strength=0.0)
    rows = [(batch, index) for batch in EXAMPLES.narrow for index in range(batch.num_rows)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2].tolist()
    subset = ProbeExamples(
        [batch.select([index]) for batch, index in (rows[place] for place in sorted(order))]
    )
    alone = points_of(model, examples=subset)
    for e in GRID:
        for noise in range(3):
            increase = value(alone, "ce_increase", strength=e, noise=noise)
            assert value(points, "ce_increase", strength=e, noise=noise) == pytest.approx(increase, abs=1e-6)
            assert value(points, "ce", strength=e, noise=noise) == pytest.approx(unmoved + increase, abs=1e-6)
        assert value(points, "ce_mean", strength=e) == pytest.approx(
            statistics.mean(value(points, "ce", strength=e, noise=noise) for noise in range(3))
        )
    assert all(p.per_example is None for p in points if "noise" in p.coordinates)
    losses = [p for p in points if "noise" in p.coordinates and p.quantity.startswith("ce")]
    assert {p.count for p in losses} == {subset_tokens(subset)}


def subset_tokens(examples: ProbeExamples) -> int:
    return sum(int(batch.counted("response").sum()) for batch in examples.narrow)


def test_a_subset_of_all_rows_is_all_rows_and_another_measurement() -> None:
    model = trained()
    probe = PerturbationCurve(GRID, 2, 0, noise_examples=99)
    assert probe.run(model, EXAMPLES) == points_of(model, num_seeds=2)
    assert probe.settings()["noise_examples"] == 99
    assert PerturbationCurve(GRID, 2, 0).settings() == {"strengths": GRID, "num_seeds": 2, "seed": 0}
    with pytest.raises(ValueError, match="noise_examples must be 1 or more, got 0; set init_args"):
        PerturbationCurve(noise_examples=0)
    check_probe(PerturbationCurve([0.5], num_seeds=2, noise_examples=2), trained(), EXAMPLES)
