"""The test, the interval and the rule against other people's code and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_em.analysis.claims import Criterion, MissingError, interval, judge, sign_flip_p
from lightning_em.analysis.claims.verdicts import together

SEEDS = (0, 1, 2, 3, 4)


def criterion(values, **changes) -> Criterion:
    """An effect with these values in seeds 0, 1, ...; None is not measured."""

    def effect(seed: int) -> float:
        if values[seed] is None:
            raise MissingError("nobody looked")
        return values[seed]

    return Criterion("something", "probability", effect, **changes)


@pytest.mark.parametrize("seed", range(5))
def test_p_is_that_of_scipys_exact_permutation_test(seed) -> None:
    values = np.random.default_rng(seed).normal(0.4, 1.0, size=7)
    oracle = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        alternative="greater",
        n_resamples=2**7,
        vectorized=False,
    )
    assert sign_flip_p(list(values)) == pytest.approx(oracle.pvalue)


def test_five_agreeing_seeds_give_a_thirty_second_and_ties_count_against() -> None:
    assert sign_flip_p([0.1, 0.2, 0.1, 3.0, 0.5]) == 1 / 32
    assert sign_flip_p([0.0] * 5) == 1.0
    assert sign_flip_p([0.3, -0.3]) == 0.75  # two of four signs reach 0, a third exceeds it
    with pytest.raises(ValueError, match="takes 1 to 16 seeds, got 0"):
        sign_flip_p([])


def test_interval_is_scipys() -> None:
    values = [0.1, 0.4, 0.2, 0.3, 0.9]
    oracle = stats.t.interval(0.95, 4, loc=np.mean(values), scale=np.std(values, ddof=1) / 5**0.5)
    assert interval(values) == pytest.approx(oracle)
    assert all(math.isnan(bound) for bound in interval([0.3]))


def test_verdicts_by_margin_and_side() -> None:
    values = [0.2, 0.25, 0.3, 0.22, 0.21]
    assert judge(criterion(values, margin=0.1), SEEDS).verdict == "holds"
    assert judge(criterion(values, margin=0.4), SEEDS).verdict == "does not hold"
    assert judge(criterion(values, margin=0.235), SEEDS).verdict == "undecided"
    assert judge(criterion(values, margin=0.4, below=True), SEEDS).verdict == "holds"
    assert judge(criterion(values, margin=0.1, below=True), SEEDS).verdict == "does not hold"


def test_finding_says_what_was_found() -> None:
    found = judge(criterion([0.2, 0.4, 0.3, 0.3, 0.3], margin=0.1), SEEDS)
    assert (found.estimate, found.n, found.rule) == (pytest.approx(0.3), 5, "> 0.1")
    assert (found.p, found.p_against) == (1 / 32, 1.0)
    assert found.low < 0.3 < found.high


def test_ratio_is_shown_as_a_ratio() -> None:
    found = judge(criterion([math.log(2.0)] * 4 + [math.log(4.0)], is_log_ratio=True), SEEDS)
    assert found.estimate == pytest.approx(2 ** (6 / 5))
    assert list(found.values.values()) == pytest.approx([2.0] * 4 + [4.0])
    assert found.rule == "> 1"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_seeds_never_give_a_verdict_and_say_why(count) -> None:
    found = judge(criterion([5.0] * 5), SEEDS[:count])
    assert found.verdict == "undecided"
    assert found.p == 0.5**count
    assert f"n = {count} gives p = {0.5**count:.3g} at best" in found.note


def test_what_is_missing_and_what_is_undefined() -> None:
    nothing = judge(criterion([None] * 5), SEEDS)
    assert (nothing.verdict, nothing.note, nothing.n) == ("not measured", "nobody looked", 0)
    partly = judge(criterion([1.0, 1.0, 1.0, 1.0, 1.0, None]), (*SEEDS, 5))
    assert (partly.verdict, partly.n, partly.note) == ("holds", 5, "seeds [5]: nobody looked")
    undefined = judge(criterion([1.0, 1.0, 1.0, 1.0, 1.0, math.nan]), (*SEEDS, 5))
    assert (undefined.verdict, undefined.p, undefined.note) == ("undecided", 1 / 32, "undefined in seeds [5]")
    assert judge(criterion([math.nan] * 5), SEEDS).verdict == "undecided"


def test_a_claim_holds_if_all_of_it_holds() -> None:
    holds = judge(criterion([1.0] * 5), SEEDS)
    fails = judge(criterion([-1.0] * 5), SEEDS)
    open_ = judge(criterion([1.0, -1.0, 1.0, -1.0, 0.0]), SEEDS)
    absent = judge(criterion([None] * 5), SEEDS)
    assert together([holds, holds]) == ("holds", 1 / 32)
    assert together([holds, open_]) == ("undecided", open_.p)
    assert together([holds, open_, absent])[0] == "not measured"
    assert together([holds, absent, fails]) == ("does not hold", 1.0)
