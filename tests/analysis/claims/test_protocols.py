"""Runs that were measured differently are not compared."""

import re

import pandas as pd
import pytest

from lightning_em.analysis.claims import evaluate
from lightning_em.analysis.claims.evidence import Arm
from tests.study_numbers import study_numbers, verdicts

TWO_ARMS = {
    "C2": Arm("general"),
    "C4": Arm("general"),
    "C5": Arm("general"),
    "C6": Arm("narrow", 10.0),
    "C7": Arm("general"),
    "C8": Arm("narrow_weight", 100.0),
    "C9": Arm("narrow", 10.0),
    "C10": Arm("general"),
    "C11": Arm("general"),
    "C13": Arm("narrow", 10.0),
    "C15": Arm("harmless_general"),
}
"""Claims that compare runs, with one arm of the comparison."""


def measured_otherwise(frame: pd.DataFrame, arm: Arm, seeds=(0, 1, 2, 3, 4)) -> pd.DataFrame:
    """The same numbers of one arm (of LoRA), by another protocol."""
    level = frame["level"].isna() if arm.level is None else frame["level"] == arm.level
    other = (frame["role"] == arm.role) & level & (frame["protocol"] != "") & frame["seed"].isin(seeds)
    protocol = frame["protocol"].mask(other & (frame["adapter"] == "rank32"), "ffffffff")
    return frame.assign(protocol=protocol)


@pytest.mark.parametrize("key", TWO_ARMS)
def test_runs_that_were_measured_otherwise_are_not_compared(key) -> None:
    found = verdicts(measured_otherwise(study_numbers(), TWO_ARMS[key]), keys=[key])[key]
    assert found.verdict == "not measured"
    assert "was measured with other settings, rows or base model: probe them alike" in found.note


def test_no_comparison_of_two_arms_escapes_their_protocols() -> None:
    """Each role is measured by a protocol of its own."""
    frame = study_numbers(adapters=("rank32",))
    frame = frame.assign(protocol=frame["role"].where(frame["protocol"] != "", ""))
    roles = "|".join(frame["role"].unique())
    of_two = re.compile(rf"\b({roles})( [\d.]+)? (-|over) ({roles})\b")
    found = [
        (result.claim, finding.words, finding.n)
        for result in evaluate(frame)
        for finding in result.findings
        if of_two.search(finding.words) and "measured there" not in result.comparison  # one record of both
    ]
    assert len(found) > 40
    assert [each for each in found if each[-1]] == []


def test_one_run_probed_again_by_another_config_leaves_its_seed_out() -> None:
    found = verdicts(measured_otherwise(study_numbers(), Arm("general"), seeds=(3,)), keys=["C2"])["C2"]
    assert (found.verdict, [finding.n for finding in found.findings]) == ("undecided", [5, 5, 4])
    assert "seeds [3]: behaviour/bad_rate[kind=held_out_domain] of general-None" in found.findings[2].note
