"""Arms, curves and settings are found where they are."""

import math

import numpy as np
import pandas as pd
import pytest

from lightning_em.analysis.claims import Evidence, MissingError
from lightning_em.analysis.claims.effects import (
    coherent_scales,
    displacement,
    highest_rate,
    increase_at,
    settings,
    strengths,
)
from lightning_em.analysis.claims.evidence import Arm, Curve
from tests.study_numbers import KL_WEIGHTS, study_numbers


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(study_numbers(jitter=0.0), "rank32", "default")


def test_curve_is_linear_between_its_places_and_nothing_beyond() -> None:
    curve = Curve((0.0, 1.0, 3.0), (0.0, 2.0, 1.0))
    assert [curve.at(place) for place in (0.0, 0.5, 1.0, 2.0)] == [0.0, 1.0, 2.0, 1.5]
    assert math.isnan(curve.at(3.5))
    assert (curve.reaches(1.5), curve.reaches(0.0)) == (0.75, 0.0)
    assert math.isnan(curve.reaches(2.5))
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
    with pytest.raises(MissingError, match="no val/ce"):
        evidence.run("general", 0).value("val/ce")


def test_an_arm_may_have_fewer_seeds_than_the_study() -> None:
    frame = study_numbers(seeds=(0, 1, 3))
    evidence = Evidence(frame[(frame["role"] != "reverse") | (frame["seed"] == 1)], "rank32", "default")
    assert evidence.seeds == evidence.seeds_of(Arm("general")) == [0, 1, 3]
    assert evidence.seeds_of(Arm("reverse")) == [1]
    assert evidence.seeds_of(Arm("sideways")) == []


def test_last_step_counts_and_earlier_ones_are_kept() -> None:
    frame = study_numbers(seeds=(0,), jitter=0.0)
    earlier = frame[frame["quantity"] == "bad_rate/held_out_domain@1"].assign(step=50, value=0.25)
    both = Evidence(pd.concat([frame, earlier]), "rank32", "default")
    run = both.run("general", 0)
    assert run.value("bad_rate/held_out_domain@1") == 0.5
    assert dict(run.by_step("bad_rate/held_out_domain@1")) == {50: 0.25, 150: 0.5}


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


def test_displacement_is_the_distance_of_the_noisy_vector() -> None:
    x, y = np.array([3.0, 0, 0]), np.array([0, 3.0, 0])
    for strength in (0.05, 0.4, 1.0):
        moved = np.sqrt(1 - strength**2) * x + strength * y
        assert displacement(strength) * 3 == pytest.approx(float(np.linalg.norm(moved - x)))


def test_noise_of_one_absolute_size_is_less_noise_for_a_longer_adapter(evidence) -> None:
    assert strengths(evidence, Arm("general")) == [0.05, 0.1, 0.2, 0.4]
    run = evidence.run("general", 0)
    assert increase_at(run, displacement(0.2) * 10) == pytest.approx(0.04)
    assert increase_at(run, 0.0) == 0.0
    assert increase_at(evidence.run("narrow", 0), displacement(0.2) * 10) < 2 * 0.04
