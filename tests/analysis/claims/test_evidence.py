"""Arms, curves and settings are found where they are."""

import math

import pandas as pd
import pytest

from lightning_em.analysis.claims import Evidence, MissingError
from lightning_em.analysis.claims.effects import (
    RISE_UNDER_NOISE,
    coherent_scales,
    highest_rate,
    rise_at,
    settings,
    strengths,
)
from lightning_em.analysis.claims.evidence import BAD_RATE, Arm, Curve, RunNumbers, Series, with_series
from tests.study_numbers import DISPLACEMENT, KL_WEIGHTS, moved, study_numbers

HELD_OUT = BAD_RATE.at(kind="held_out_domain", scale=1)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(study_numbers(jitter=0.0), "rank32", "default")


def test_curve_is_linear_between_its_places_and_nothing_beyond() -> None:
    curve = Curve((0.0, 1.0, 3.0), (0.0, 2.0, 1.0))
    assert [curve.at(place) for place in (0.0, 0.5, 1.0, 2.0)] == [0.0, 1.0, 2.0, 1.5]
    assert math.isnan(curve.at(3.5))
    assert (curve.last_reaches(1.5, 3.0), curve.last_reaches(1.5, 1.5)) == (2.0, 0.75)
    assert (curve.last_reaches(0.0, 3.0), curve.last_reaches(1.75, 1.5)) == (0.0, 1.5)
    assert math.isnan(curve.last_reaches(2.5, 3.0))
    with pytest.raises(MissingError, match="measured at 1 only"):
        Curve((1.0,), (2.0,)).at(0.5)


def test_arms_by_level(evidence) -> None:
    assert [arm.level for arm in evidence.arms("narrow_weight")] == list(KL_WEIGHTS)
    assert evidence.arm("mixed_other", near=0.2) == Arm("mixed_other", 1 / 6)
    assert evidence.arm("mixed_other", near=0.4) == Arm("mixed_other", 1 / 2)
    with pytest.raises(MissingError, match="several mixed_other arms"):
        evidence.arm("mixed_other")
    with pytest.raises(MissingError, match="no sideways arm for rank32 in the default world"):
        evidence.arm("sideways")
    with pytest.raises(MissingError, match="no metrics/val/ce"):
        evidence.run("general", 0).value(Series("metrics", "val/ce"))


def test_an_arm_may_have_fewer_seeds_than_the_study() -> None:
    frame = study_numbers(seeds=(0, 1, 3))
    evidence = Evidence(frame[(frame["role"] != "reverse") | (frame["seed"] == 1)], "rank32", "default")
    assert evidence.seeds == evidence.seeds_of(Arm("general")) == [0, 1, 3]
    assert evidence.seeds_of(Arm("reverse")) == [1]
    assert evidence.seeds_of(Arm("sideways")) == []


def test_last_step_counts_and_earlier_ones_are_kept() -> None:
    frame = study_numbers(seeds=(0,), jitter=0.0)
    rates = frame[(frame["quantity"] == "bad_rate") & (frame["kind"] == "held_out_domain")]
    earlier = rates[rates["scale"].isin(["1", "2"])].assign(step=50, value=0.25)
    frame = frame.drop(rates.index[rates["scale"] == "2"])
    both = Evidence(pd.concat([frame, earlier]), "rank32", "default")
    run = both.run("general", 0)
    assert run.value(HELD_OUT) == 0.5
    assert dict(run.by_step(HELD_OUT)) == {50: 0.25, 150: 0.5}
    # scale 2 was measured at the earlier step alone: a curve is one record's
    assert run.curve(BAD_RATE.at(kind="held_out_domain"), "scale").places == (0.0, 1.0, 5.0, 10.0, 20.0)
    with pytest.raises(MissingError, match=r"no behaviour/bad_rate\[kind=held_out_domain, scale=2\]"):
        run.value(HELD_OUT.at(scale=2))


def test_equal_coordinates_are_one_place_however_they_were_written() -> None:
    assert (
        HELD_OUT.at(scale=0.1 + 0.2)
        == HELD_OUT.at(scale="0.3")
        == BAD_RATE.at(scale=0.3, kind="held_out_domain")
    )
    assert str(HELD_OUT) == "behaviour/bad_rate[kind=held_out_domain, scale=1]"


def test_two_runs_of_one_role_are_refused() -> None:
    frame = study_numbers(seeds=(0,))
    frame.loc[frame["role"] == "reverse", "role"] = "reverted"
    with pytest.raises(ValueError, match=r"are both reverted, seed 0, of rank32 in the default world"):
        Evidence(frame, "rank32", "default")


def test_matched_narrow_rate_and_equal_norm_scale_the_larger_one_down(evidence) -> None:
    general, narrow = Arm("general"), Arm("narrow", 10.0)
    ways = dict(settings(evidence, general, "narrow"))
    assert ways["equal steps"](general, 0) == 1.0
    # from .01 at scale 0 to .95 at 1: .9 lies at (.9 - .01) / .94
    assert ways["matched narrow rate"](general, 0) == pytest.approx(0.89 / 0.94)
    assert ways["matched narrow rate"](narrow, 0) == 1.0
    assert ways["equal effective norm"](general, 0) == 1.0
    assert ways["equal effective norm"](narrow, 0) == pytest.approx(10 / 11)


def test_only_coherent_scales_are_looked_at(evidence) -> None:
    run = evidence.run(Arm("narrow_weight", 1.0), 0)
    assert coherent_scales(run) == [2.0, 5.0, 10.0]  # at 20 only .05 are answers
    assert highest_rate(run) == 0.3


def test_arm_with_the_lower_narrow_rate_stays_as_trained_and_the_other_moves_least() -> None:
    def change(runs, seed) -> None:
        """Both rates rise, fall and rise again before scale 1."""
        seen = BAD_RATE.at(kind="narrow_seen")
        runs["general", None] |= {seen.at(scale=0.4): 0.99, seen.at(scale=0.6): 0.2}
        runs["narrow", 10.0] |= {seen.at(scale=0.4): 0.99, seen.at(scale=0.6): 0.3}

    evidence = Evidence(study_numbers(change=change, jitter=0.0), "rank32", "default")
    general, narrow = Arm("general"), Arm("narrow", 10.0)
    matched = dict(settings(evidence, general, "narrow"))["matched narrow rate"]
    assert matched(narrow, 0) == 1.0
    # from .2 at scale .6 to .95 at 1
    assert matched(general, 0) == pytest.approx(0.6 + 0.4 * (0.9 - 0.2) / (0.95 - 0.2))


def test_rise_under_noise_of_a_size_is_exact_for_a_quadratic(evidence) -> None:
    assert strengths(evidence, Arm("general")) == [0.05, 0.1, 0.2, 0.4]
    general, narrow = evidence.run("general", 0), evidence.run("narrow", 0)
    assert rise_at(general, moved(0.2) * 10) == pytest.approx(0.04)
    assert rise_at(general, 0.0) == 0.0
    assert rise_at(narrow, moved(0.2) * 10) < 2 * 0.04, "the same noise is less for a longer adapter"
    lengths = (0.0, 0.5, 1.0, 2.0, 4.0)
    rows = [(DISPLACEMENT.quantity, length, length) for length in lengths[1:]]
    rows += [(RISE_UNDER_NOISE.quantity, length, 3 * length**2) for length in lengths[1:]]
    frame = pd.DataFrame(rows, columns=["quantity", "strength", "value"])
    run = RunNumbers("quadratic", with_series(frame.assign(source="perturbation_curve", step=1, protocol="")))
    for length in (0.1, 0.7, 1.5, 3.9):
        assert rise_at(run, length) == pytest.approx(3 * length**2)
    assert math.isnan(rise_at(run, 4.1))
