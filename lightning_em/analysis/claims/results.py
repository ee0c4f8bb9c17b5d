"""Results of every claim for every adapter type and world: estimate, interval, test, verdict."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.analysis.claims.evidence import Evidence, evidence_of
from lightning_em.analysis.claims.specs import Claim, claims_of
from lightning_em.analysis.claims.verdicts import (
    TEST,
    Comparison,
    Finding,
    MissingError,
    Verdict,
    judge,
    together,
)

ADAPTERS = ("rank32", "rank1", "vector")


@dataclass(frozen=True)
class ClaimResult:
    """Result of one comparison of a claim, for one adapter type in one world.

    Attributes:
        spec: The claim.
        adapter: Adapter type.
        world: Name of the world.
        comparison: Name of the comparison.
        decides: Whether this comparison gives the claim's verdict; other comparisons are reported for information.
        estimate: Mean effect of the headline criterion, in `unit`; NaN if not measured.
        low: Lower end of its 95 % interval over seeds.
        high: Upper end of the same interval.
        unit: Unit of `estimate`, `low` and `high`.
        n: Number of seeds in the estimate.
        test: Name of the test that gives p.
        p: Largest p-value of all criteria.
        verdict: Verdict on all criteria together.
        note: Criteria that fail or are undecided, and missing measurements.
        findings: Findings of all criteria.
        headline: Finding whose estimate is shown in tables; None if nothing was measured.
    """

    spec: Claim
    adapter: str
    world: str
    comparison: str
    decides: bool
    estimate: float
    low: float
    high: float
    unit: str
    n: int
    test: str
    p: float
    verdict: Verdict
    note: str
    findings: tuple[Finding, ...] = ()
    headline: Finding | None = None

    @property
    def claim(self) -> str:
        """Key of the claim."""
        return self.spec.key


def evaluate(frame: pd.DataFrame, keys: Collection[str] | None = None) -> list[ClaimResult]:
    """Test every claim for every adapter type and world of the measurements.

    Args:
        frame: Table from `measurements`.
        keys: Keys of the claims to test; all claims of the literature and of the study's own if not given.

    Raises:
        ValueError: If two runs of one seed have the same role and level.
    """
    return results_of(evidence_of(frame), keys)


def results_of(evidence: Sequence[Evidence], keys: Collection[str] | None = None) -> list[ClaimResult]:
    """Test every claim on all evidence of a study, the default world first; see `evaluate`."""
    results: list[ClaimResult] = []
    for e in sorted(evidence, key=_place):
        claims = claims_of(e.rules)
        for key in claims if keys is None else keys:
            results += _test(claims[key], e)
    return results


def _place(e: Evidence) -> tuple[bool, str, int, str]:
    rank = ADAPTERS.index(e.adapter) if e.adapter in ADAPTERS else len(ADAPTERS)
    return e.world != DEFAULT_WORLD, e.world, rank, e.adapter


def _test(claim: Claim, evidence: Evidence) -> Iterator[ClaimResult]:
    """Judge all comparisons of a claim.

    All comparisons are built before the first one is judged. If building fails because something is missing, the
    whole claim is not measured. Measurements that only one comparison needs are looked up by its criteria, seed by
    seed, so their absence does not affect the other comparisons.
    """
    try:
        comparisons = list(claim.comparisons(evidence))
    except MissingError as error:
        yield _not_measured(claim, evidence, str(error))
        return
    assert sum(comparison.decides for comparison in comparisons) == 1, f"{claim.key}: one comparison decides"
    for comparison in comparisons:
        yield _result(claim, evidence, comparison)


def _result(claim: Claim, evidence: Evidence, comparison: Comparison) -> ClaimResult:
    findings = tuple(judge(criterion, evidence.seeds) for criterion in comparison.criteria)
    verdict, p = together(findings)
    headline = findings[comparison.headline]
    return ClaimResult(
        claim, evidence.adapter, evidence.world, comparison.name, comparison.decides,
        headline.estimate, headline.low, headline.high, headline.unit, headline.n, TEST, p, verdict,
        _note(findings, evidence.stands_in), findings, headline,
    )  # fmt: skip


def _note(findings: Sequence[Finding], stands_in: bool) -> str:
    """Describe the criteria that fail or are undecided, and the missing measurements."""
    notes = []
    if stands_in and any("answers" in finding.words for finding in findings):
        notes.append(
            "no answers were judged: the share of rows whose bad answer is the likelier one stands in"
        )
    for finding in findings:
        if finding.verdict == "does not hold":
            opposite = f"p {finding.p_against:.2g} for the opposite"
            notes.append(
                f"fails: {finding.words} ({finding.estimate:.2g}, wanted {finding.rule}, {opposite})"
            )
        if finding.verdict == "undecided" and finding.is_decidable and len(findings) > 1:
            notes.append(f"open: {finding.words} ({finding.estimate:.2g}, wanted {finding.rule})")
        if finding.note:
            notes.append(finding.note)
    return "; ".join(dict.fromkeys(notes))


def _not_measured(claim: Claim, evidence: Evidence, why: str) -> ClaimResult:
    nan = math.nan
    return ClaimResult(
        claim, evidence.adapter, evidence.world, "-", True, nan, nan, nan, "", 0, TEST, nan,
        "not measured", why,
    )  # fmt: skip
