"""Claims on measurements with known answers: true, false, noisy, missing."""

import math

import numpy as np
import pandas as pd
import pytest

from lightning_em.analysis.claims import CLAIMS, Claim, Criterion, evaluate
from lightning_em.analysis.claims.evidence import Series
from lightning_em.analysis.claims.rules import Difference, Rules
from lightning_em.analysis.claims.verdicts import Comparison
from lightning_em.analysis.measurements import read_measurements
from lightning_em.study.claim_tables import summary_table
from tests.study_numbers import (
    KL_WEIGHTS,
    PC1,
    become,
    behaviour,
    noise,
    preferred,
    rates,
    spread,
    study_numbers,
    verdicts,
)


def test_there_is_a_spec_for_every_claim() -> None:
    assert list(CLAIMS) == ["C1", "C2", "C3", "C3b", *(f"C{number}" for number in range(4, 16))]


@pytest.mark.parametrize("adapter", ["rank32", "vector"])
def test_all_true(adapter) -> None:
    found = verdicts(study_numbers(), adapter)
    not_for_vectors = {"C11"} if adapter == "vector" else set()
    assert {key for key, result in found.items() if result.verdict != "holds"} == not_for_vectors
    assert all(found[key].p == 1 / 32 and found[key].n == 5 for key in found if key not in not_for_vectors)


def test_estimates_are_those_that_were_put_in() -> None:
    found = verdicts(study_numbers(jitter=0.0))
    expected = {
        "C1": 0.49,
        "C2": 0.02,
        "C3": 0.39,
        "C3b": 0.29,
        "C6": 0.38,
        "C7": 0.03,
        "C8": 0.27,
        "C10": 0.45,
    }
    assert {key: found[key].estimate for key in expected} == pytest.approx(expected)
    at_equal_norm = (
        1.6 * (10 / 11 / 1.4 - 1) ** 2
    )  # the narrow parabola, scaled to norm 10; the general is at its floor
    assert found["C4"].estimate == pytest.approx(at_equal_norm, rel=0.02)
    assert found["C5"].estimate == pytest.approx(60 * 0.2**2)
    assert found["C9"].estimate == pytest.approx(0.8 / 0.3)
    assert [finding.estimate for finding in found["C11"].findings] == pytest.approx([0.2, -0.9, 1.1])
    assert found["C12"].estimate == pytest.approx(0.8)
    assert [finding.estimate for finding in found["C14"].findings] == pytest.approx([0.2, 0.1])
    assert found["C13"].estimate == pytest.approx(
        0.8 / (0.3 * (10 / 11) ** 2), rel=0.05
    )  # linear between ratios


def test_second_half_of_a_claim_counts() -> None:
    """The large weight shows the spread too when scaled up; the smaller one still hides it."""
    loud = rates("held_out_domain", (0.01, 0.01, 0.2, 0.3, 0.3, 0.9))
    found = verdicts(study_numbers(change=become("narrow_weight", 100.0, loud)), keys=["C8"])["C8"]
    assert found.verdict == "does not hold"
    assert found.estimate == pytest.approx(0.27, abs=0.01)  # the half that holds
    assert (
        "narrow at KL weight 100, highest of all coherent scales (0.3, wanted < 0.05, p 0.031 for the opposite)"
        in found.note
    )


def test_incoherent_scales_decide_nothing() -> None:
    garbage = rates("held_out_domain", (0.01, 0.01, 0.5, 0.6, 0.9, 0.9), Series("behaviour", "other_rate"))
    found = verdicts(study_numbers(change=become("narrow_weight", 1.0, garbage)), keys=["C8"])["C8"]
    assert found.verdict == "undecided"
    assert "undefined in seeds [0, 1, 2, 3, 4]" in found.note


def test_weight_that_hides_is_chosen_at_scale_one() -> None:
    found = verdicts(study_numbers())["C8"]
    assert (
        found.comparison == "KL weights 1 and 100"
    )  # .1 does not hide it, 10 is no longer the smallest that does


def search(runs, seed) -> None:
    """Weights that were tried with one seed, on either side of the others."""
    if seed == 0:
        runs["narrow_weight", 0.5] = runs["narrow_weight", 1.0] | {PC1: 5.0}
        runs["narrow_weight", 1000.0] = runs["narrow_weight", 100.0] | {PC1: 0.1}


def test_weights_tried_with_one_seed_keep_no_verdict_from_the_others() -> None:
    found = verdicts(study_numbers(change=search), keys=["C8", "C12"])
    assert found["C8"].comparison == "KL weights 1 and 100"
    assert [(r.verdict, r.p, r.n) for r in found.values()] == [("holds", 1 / 32, 5)] * 2


def test_order_of_two_weights_is_not_measured() -> None:
    def change(runs, seed) -> None:
        for weight in KL_WEIGHTS:
            del runs["narrow_weight", weight]

    found = verdicts(study_numbers(change=change), keys=["C12"])["C12"]
    assert found.verdict == "not measured"
    assert "fewer than three KL weights, 0 included" in found.note


def test_noise_over_seeds_leaves_a_claim_undecided() -> None:
    def change(runs, seed) -> None:
        held_out = (0.02, 0.5, 0.04, 0.3, 0.06)[seed]
        runs["general", None] = runs["general", None] | behaviour(0.9, held_out)
        runs["narrow", 10.0] = runs["narrow", 10.0] | noise((0.5, 2.0, 0.9, 1.2, 0.8)[seed])

    found = verdicts(study_numbers(change=change))
    assert [found[key].verdict for key in ("C1", "C5")] == ["undecided", "undecided"]
    assert found["C1"].low < 0.1 < found["C1"].high


def test_missing_arm_is_not_measured() -> None:
    def change(runs, seed) -> None:
        for role in ("reverted", "harmless_general"):
            del runs[role, None]

    found = verdicts(study_numbers(change=change, pairs={}))
    missing = {key for key, result in found.items() if result.verdict == "not measured"}
    assert missing == {"C6", "C12", "C15"}
    assert found["C6"].note == "the study has no reverted arm for rank32 in the default world"
    assert math.isnan(found["C6"].estimate)


def test_preference_stands_in_where_no_answer_was_judged() -> None:
    judged = study_numbers()
    frame = preferred(judged)
    keys = ("C1", "C2", "C4", "C8")
    found, expected = verdicts(frame, keys=keys), verdicts(judged, keys=keys)
    for key in ("C1", "C2", "C4"):
        assert (found[key].verdict, found[key].estimate) == (expected[key].verdict, expected[key].estimate)
    assert ["stands in" in found[key].note for key in ("C1", "C2", "C4")] == [True, True, False]
    assert "stands in" not in expected["C1"].note
    assert found["C8"].verdict == "not measured", "whether scaled-up answers are coherent is not known"


def test_two_seeds_never_give_a_verdict() -> None:
    found = verdicts(study_numbers(seeds=(0, 1)))
    assert {result.verdict for result in found.values()} == {"undecided"}
    assert all(
        result.p >= 0.25 and "no verdict: n = 2 gives p = 0.25 at best" in result.note
        for result in found.values()
    )


def test_control_world_is_judged_by_itself() -> None:
    control = study_numbers(change=spread("general", 0.03), world="control")
    frame = pd.concat([study_numbers(), control])
    assert verdicts(frame)["C1"].verdict == "holds"
    found = verdicts(frame, world="control")
    # nothing is left that would have to be forced, or could be reversed
    assert {key for key, result in found.items() if result.verdict == "does not hold"} == {
        "C1",
        "C2",
        "C7",
        "C10",
    }


def test_other_comparisons_stand_beside_the_verdict() -> None:
    ways = {
        (r.claim, r.comparison): r
        for r in evaluate(study_numbers())
        if r.adapter == "rank32" and not r.decides
    }
    for key in ("C1", "C2", "C6", "C7", "C9", "C15"):
        assert {(key, "matched narrow rate"), (key, "equal effective norm")} <= set(ways)
    assert ways["C9", "matched narrow rate"].verdict == "not measured"
    assert "measured at 1 only" in ways["C9", "matched narrow rate"].note
    assert ways["C4", "equal effective norm, measured there"].estimate == pytest.approx(0.1)
    assert ways["C5", "equal effective norm of the noise"].verdict == "holds"
    assert (
        ways["C2", "control: KL on the narrow prompts, kl_on_narrow at KL weight 10"].verdict
        == "does not hold"
    )
    # shorter norms at a lower loss: the published ratio rewards the longer one
    assert ways["C4", "the published ratio"].unit == "nats per token per squared norm"


def test_results_do_not_depend_on_the_order_of_rows() -> None:
    frame = study_numbers()
    shuffled = frame.sample(frac=1.0, random_state=np.random.default_rng(0).integers(2**31))
    assert [(r.claim, r.p, r.verdict) for r in evaluate(frame)] == [
        (r.claim, r.p, r.verdict) for r in evaluate(shuffled)
    ]


def test_noise_beyond_what_is_compared_is_not_measured() -> None:
    frame = study_numbers()
    frame = frame[(frame["source"] != "perturbation_curve") | (frame["strength"] == "0.2")]
    frame = frame.assign(strength=frame["strength"].str.replace("0.2", "0.6"))
    found = verdicts(frame, keys=["C5"])["C5"]
    assert (found.verdict, found.note) == (
        "not measured",
        "noise was measured from strength 0.6 on, beyond 0.4",
    )


def test_gradients_of_no_common_checkpoint_are_not_measured() -> None:
    frame = study_numbers()
    frame.loc[frame["target"] == "narrow", "step"] += 1
    found = verdicts(frame, keys=["C14"])["C14"]
    assert found.verdict == "not measured"
    assert "no checkpoint has the gradient's cosine with both solutions" in found.note


def test_fields_say_which_comparison_decides_and_which_effect_is_the_headline(monkeypatch) -> None:
    def comparisons(_):
        low, high = (
            Criterion(name, "share", lambda seed, v=value: v) for name, value in (("low", 1.0), ("high", 2.0))
        )
        return [
            Comparison("beside", (low, high)),
            Comparison("the test", (low, high), decides=True, headline=1),
        ]

    monkeypatch.setitem(CLAIMS, "T", Claim("T", "two is more than nothing", False, "", comparisons))
    beside, decisive = evaluate(study_numbers(adapters=("rank32",)), ["T"])
    assert (beside.decides, beside.estimate, beside.headline) == (False, 1.0, beside.findings[0])
    assert (decisive.decides, decisive.estimate, decisive.headline) == (True, 2.0, decisive.findings[1])
    cell = summary_table([beside, decisive]).rows[-1]
    assert cell[1:] == ("high (share), > 0", "**holds** 2.00 [2.00, 2.00]")


def test_one_comparison_of_each_claim_decides() -> None:
    results = [r for r in evaluate(study_numbers()) if r.adapter == "rank32"]
    assert [r.claim for r in results if r.decides] == list(CLAIMS)


def test_what_one_comparison_lacks_drops_no_other() -> None:
    """Without a general run, mixing can still be judged, and what it is set against is reported as missing."""

    def change(runs, seed) -> None:
        del runs["general", None]

    results = [r for r in evaluate(study_numbers(change=change), ["C3"]) if r.adapter == "rank32"]
    assert [r.verdict for r in results] == ["holds", "holds", "not measured", "not measured"]
    assert results[0].decides
    assert all("no general run of rank32" in r.note for r in results[2:])


def test_margins_are_the_studys_own() -> None:
    strict = verdicts(study_numbers(rules=Rules(rise=0.6, narrow=0.05, exact_rates=True)))
    assert (strict["C1"].verdict, strict["C1"].findings[0].rule) == ("does not hold", "> 0.6")
    lax = verdicts(
        study_numbers(change=spread("narrow", 0.3, 10.0), rules=Rules(rise=0.1, narrow=0.4)), keys=["C2"]
    )
    assert lax["C2"].findings[0].verdict == "holds"
    silent = verdicts(study_numbers(rules=Rules()))
    needing = {key for key, result in silent.items() if result.verdict == "not measured"}
    assert needing == {"C1", "C2", "C3", "C3b", "C6", "C7", "C8", "C10", "C15"}
    assert silent["C1"].note == "the study names no margin: set claims.rise in its file"


def test_a_study_tests_claims_of_its_own(tmp_path) -> None:
    """On any quantity of any probe: which of the two solutions has more, and by how much."""
    found = Series("beyond", "ce_change").at(scale=2, where="2")

    def change(runs, seed) -> None:
        runs["general", None] |= {found: 1.0}
        runs["narrow", 10.0] |= {found: 1.5, found.at(scale=3): 9.0}

    at = {"scale": 2, "where": "2"}
    own = {
        "Q1": Difference("narrow", "beyond", "ce_change", at, 0.1),
        "Q2": Difference("general", "beyond", "ce_change", at),
        "Q3": Difference("narrow", "beyond", "ce_change", at, 0.6),
        "Q4": Difference("narrow", "beyond", "ce_change", {"scale": 2}),
    }
    frame = study_numbers(change=change, jitter=0.0, rules=Rules(rise=0.1, narrow=0.05, differences=own))
    assert Rules.of(frame) == Rules(rise=0.1, narrow=0.05, differences=own)
    frame.to_csv(tmp_path / "measurements.csv", index=False)
    for table in (frame, read_measurements(tmp_path / "measurements.csv")):
        results = [r for r in evaluate(table) if r.adapter == "rank32" and r.claim in own]
        assert [(r.claim, r.verdict, r.n) for r in results] == [
            ("Q1", "holds", 5), ("Q2", "does not hold", 5), ("Q3", "does not hold", 5), ("Q4", "not measured", 0),
        ]  # fmt: skip
        assert results[0].estimate == pytest.approx(0.5)
        assert (results[0].unit, results[0].findings[0].rule) == ("unit", "> 0.1")
        assert "no beyond/ce_change[scale=2]" in results[3].note
    table = summary_table(evaluate(frame))
    assert "**Q1** the narrow solution has more beyond/ce_change[scale=2, where=2] than the general one" in {
        row[0] for row in table.rows
    }


def test_sampled_rates_are_tested_at_a_scale_named_beforehand_alone() -> None:
    rules = {"rise": 0.1, "narrow": 0.05}
    sampled = verdicts(study_numbers(rules=Rules(**rules)), keys=["C8"])["C8"]
    assert sampled.verdict == "not measured"
    assert "set claims.hidden_scale in the study's file" in sampled.note
    named = verdicts(study_numbers(rules=Rules(**rules, hidden_scale=2.0), jitter=0.0), keys=["C8"])["C8"]
    assert (named.verdict, named.estimate) == ("holds", pytest.approx(0.27))
    assert [finding.words.rpartition("100, ")[2] for finding in named.findings[1:]] == ["scale 2", "scale 1"]
    # louder at 5 only: no maximum finds it
    loud = become("narrow_weight", 100.0, rates("held_out_domain", (0.01, 0.01, 0.01, 0.3, 0.3, 0.9)))
    found = verdicts(study_numbers(change=loud, rules=Rules(**rules, hidden_scale=2.0)), keys=["C8"])["C8"]
    assert found.verdict == "holds"
    incoherent = verdicts(study_numbers(rules=Rules(**rules, hidden_scale=20.0)), keys=["C8"])["C8"]
    assert incoherent.verdict == "undecided"
