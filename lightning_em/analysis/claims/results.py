"""Every claim for every adapter type and world: estimate, interval, test, verdict."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.analysis.claims.evidence import Evidence
from lightning_em.analysis.claims.rules import STUDY
from lightning_em.analysis.claims.specs import CLAIMS, Claim
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
    """One claim, for one adapter type in one world, compared in one way.

    Attributes:
        claim: Its key.
        adapter: Adapter type.
        world: World.
        comparison: How the runs were compared.
        decides: Whether this comparison is the claim's verdict; the others stand beside it.
        estimate: Mean effect of the headline, in `unit`; NaN if not measured.
        low: Lower end of its 95 % interval over seeds.
        high: Upper end.
        unit: Of the three.
        n: Seeds behind it.
        test: Behind p.
        p: Of the claim: the largest of its criteria.
        verdict: Of the claim.
        note: What keeps it from holding, what is missing.
        findings: All its criteria.
        headline: The one whose estimate stands in the tables; None if nothing was measured.
    """

    claim: str
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


def evaluate(frame: pd.DataFrame, keys: Collection[str] = tuple(CLAIMS)) -> list[ClaimResult]:
    """Put every claim to the test, for every adapter type and world of the measurements.

    Args:
        frame: From `measurements`.
        keys: Claims to test.

    Raises:
        ValueError: If two runs play the same role.
    """
    results = []
    worlds = frame["world"][frame["role"] != STUDY].unique()
    for world in sorted(worlds, key=lambda name: (name != DEFAULT_WORLD, name)):
        own = set(frame[frame["world"] == world]["adapter"])
        for adapter in [*(a for a in ADAPTERS if a in own), *sorted(own - set(ADAPTERS))]:
            evidence = Evidence(frame, adapter, world)
            results += [result for key in keys for result in _test(CLAIMS[key], evidence)]
    return results


def _test(claim: Claim, evidence: Evidence) -> Iterator[ClaimResult]:
    """Judge all comparisons of a claim.

    They are built before any is judged. What is missing then keeps the whole claim from being measured; what is
    missing for one comparison alone is missed by its criteria, seed by seed, and the others stand.
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
        claim.key, evidence.adapter, evidence.world, comparison.name, comparison.decides,
        headline.estimate, headline.low, headline.high, headline.unit, headline.n, TEST, p, verdict,
        _note(findings, evidence.stands_in), findings, headline,
    )  # fmt: skip


def _note(findings: Sequence[Finding], stands_in: bool) -> str:
    """Which parts keep a claim from holding, and what is missing."""
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
        claim.key, evidence.adapter, evidence.world, "-", True, nan, nan, nan, "", 0, TEST, nan,
        "not measured", why,
    )  # fmt: skip
