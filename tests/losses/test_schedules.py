"""Schedules of the KL weight."""

import math

import pytest

from lightning_em.losses import Constant, HoldKL, OffAt, OnAt, Ramp


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Constant(), [1, 1, 1, 1, 1]),
        (OffAt(2), [1, 1, 0, 0, 0]),
        (OnAt(2), [0, 0, 1, 1, 1]),
        (Ramp(4), [0, 0.25, 0.5, 0.75, 1]),
        (Ramp(2), [0, 0.5, 1, 1, 1]),
    ],
)
def test_factor_at_each_step(schedule, factors) -> None:
    assert [schedule.factor(step) for step in range(5)] == factors


@pytest.mark.parametrize("slope", [0.2, 5.0])
def test_hold_kl_finds_the_weight_that_holds_the_target(slope: float) -> None:
    """A plant whose KL falls with the weight: kl = slope / (1 + weight)."""
    schedule = HoldKL(target=0.1, rate=0.2)
    for step in range(400):
        schedule.observe(slope / (1 + schedule.factor(step)))
    assert slope / (1 + schedule.factor(400)) == pytest.approx(0.1, rel=1e-3)


def test_hold_kl_moves_one_e_fold_at_most_and_stays_in_bounds() -> None:
    schedule = HoldKL(target=1e-3, rate=1.0, max_factor=100.0)
    schedule.observe(1e9)
    assert schedule.factor(1) == pytest.approx(math.e)
    for _ in range(50):
        schedule.observe(1e9)
    assert schedule.factor(51) == pytest.approx(100.0)
    for _ in range(50):
        schedule.observe(0.0)
    assert schedule.factor(101) == pytest.approx(1 / 100)


def test_a_kl_that_is_no_number_does_not_poison_the_weight() -> None:
    schedule = HoldKL(target=0.1)
    schedule.observe(0.3)
    before = schedule.factor(1)
    for kl in (math.nan, math.inf):
        schedule.observe(kl)
    assert schedule.factor(3) == before


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    whole, first, second = (HoldKL(target=0.1) for _ in range(3))
    for kl in (0.3, 0.2):
        whole.observe(kl)
        first.observe(kl)
    second.load_state_dict(first.state_dict())
    for schedule in (whole, second):
        schedule.observe(0.05)
    assert whole.factor(3) == second.factor(3)
    assert OffAt(1).state_dict() == {}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        Ramp(0)
    for settings in ({"target": 0.0}, {"target": 1.0, "rate": 0.0}, {"target": 1.0, "max_factor": 1.0}):
        with pytest.raises(ValueError, match="HoldKL needs target > 0, rate > 0 and max_factor > 1"):
            HoldKL(**settings)
