"""Verdicts from one number per seed: confidence interval, exact test and decision rule."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from lightning_em.analysis.cells import MOST_SEEDS

SIGNIFICANCE = 0.05
TEST = "one-sided exact sign-flip test of the mean over seeds"

Verdict = Literal["holds", "does not hold", "undecided", "not measured"]
Effect = Callable[[int], float]
"""Function from a seed to its effect; NaN if measured but undefined. Raises `MissingError` if not measured."""


class MissingError(LookupError):
    """A measurement that a claim needs is missing from the study; the message names it."""


@dataclass(frozen=True)
class Criterion:
    """One statement of a claim: an effect lies above a margin, or below it.

    Attributes:
        words: Description of the effect for tables.
        unit: Unit of the effect.
        effect: Function that returns the effect of one seed.
        margin: Threshold that the effect must exceed.
        below: Whether the effect must be smaller than the margin instead.
        is_log_ratio: Whether the effect is the logarithm of a ratio; findings then hold the ratio.
    """

    words: str
    unit: str
    effect: Effect
    margin: float = 0.0
    below: bool = False
    is_log_ratio: bool = False


@dataclass(frozen=True)
class Comparison:
    """One way to test a claim: all of its criteria must hold.

    Attributes:
        name: Name of the comparison.
        criteria: Criteria to test.
        decides: Whether its verdict is the claim's verdict; exactly one comparison of a claim decides.
        headline: Index of the criterion whose estimate is shown in tables.
    """

    name: str
    criteria: tuple[Criterion, ...]
    decides: bool = False
    headline: int = 0


@dataclass(frozen=True)
class Finding:
    """A measured criterion.

    Attributes:
        words: Description of the effect for tables.
        unit: Unit of all the numbers.
        rule: Condition that the claim states for the effect, e.g. `> 0.1`.
        estimate: Mean over seeds, geometric for a ratio; NaN if not measured.
        low: Lower end of the 95 % t interval over seeds; NaN for fewer than two seeds.
        high: Upper end of the same interval.
        n: Number of seeds with a value.
        p: Probability, by chance, of a mean at least this far on the claim's side of the margin.
        p_against: The same probability for the other side of the margin.
        verdict: Verdict by the rule of `judge`.
        note: Seeds without a value, and the reason if no verdict is possible.
        values: Effect by seed.
    """

    words: str
    unit: str
    rule: str
    estimate: float
    low: float
    high: float
    n: int
    p: float
    p_against: float
    verdict: Verdict
    note: str
    values: Mapping[int, float]

    @property
    def is_decidable(self) -> bool:
        """Whether this number of seeds can give a verdict at all."""
        return 0.5**self.n <= SIGNIFICANCE


def sign_flip_p(effects: Sequence[float]) -> float:
    """Compute the one-sided p-value of the exact sign-flip test of the mean.

    It is the share of all 2^n assignments of signs to the effects whose mean is at least the observed one. Five
    positive effects give 1/32 = .031, the smallest p-value for five seeds.

    Raises:
        ValueError: If there are no effects, or more than `MOST_SEEDS`.
    """
    if not 0 < len(effects) <= MOST_SEEDS:
        raise ValueError(f"the exact test takes 1 to {MOST_SEEDS} seeds, got {len(effects)}.")
    values = np.asarray(effects, dtype=float)
    # row i holds the bits of i: 1 flips the sign of that effect
    flips = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    sums = ((1 - 2 * flips) * values).sum(axis=1)
    observed = values.sum()
    # the tolerance counts sums that equal the observed one up to rounding
    return float(np.mean(sums >= observed - 1e-9 * np.abs(values).sum()))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % t interval of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(special.stdtrit(len(values) - 1, 0.975)) * error
    return mean - half, mean + half


def judge(criterion: Criterion, seeds: Sequence[int]) -> Finding:
    """Evaluate one criterion over seeds.

    The verdict is `holds` if the mean is on the claim's side of the margin with p <= .05, `does not hold` if it
    is on the other side with p <= .05, and `undecided` otherwise. It is also `undecided` if the effect is
    undefined in any seed, because undefined seeds may not be missing at random.
    """
    values, missing = _collect(criterion, seeds)
    defined = {seed: value for seed, value in values.items() if not math.isnan(value)}
    undefined = sorted(set(values) - set(defined))
    notes = []
    if missing:
        whole = "" if not values else f"seeds {sorted(missing)}: "
        notes.append(whole + next(iter(missing.values())))
    if undefined:
        notes.append(f"undefined in seeds {undefined}")
    if not defined:
        verdict: Verdict = "undecided" if undefined else "not measured"
        return _finding(criterion, {}, math.nan, math.nan, verdict, notes)
    side = -1.0 if criterion.below else 1.0
    beyond = [side * (value - criterion.margin) for value in defined.values()]
    p, against = sign_flip_p(beyond), sign_flip_p([-value for value in beyond])
    best = 0.5 ** len(beyond)
    if best > SIGNIFICANCE:
        notes.append(f"no verdict: n = {len(beyond)} gives p = {best:.3g} at best")
    verdict = "holds" if p <= SIGNIFICANCE else "does not hold" if against <= SIGNIFICANCE else "undecided"
    return _finding(criterion, defined, p, against, "undecided" if undefined else verdict, notes)


def together(findings: Sequence[Finding]) -> tuple[Verdict, float]:
    """Combine the findings of a claim that requires all of its criteria to hold.

    p is the largest p-value, so *holds* needs no correction (intersection-union test). *Does not hold* is not
    corrected: the opposite of any one criterion at p <= .05 is enough, so its error rate grows with the number of
    criteria.
    """
    verdicts = {finding.verdict for finding in findings}
    # the first verdict in this order that any criterion has: one failing criterion is enough, even if others are open
    order: tuple[Verdict, ...] = ("does not hold", "not measured", "undecided", "holds")
    verdict: Verdict = next((v for v in order if v in verdicts), "not measured")
    known = [finding.p for finding in findings if not math.isnan(finding.p)]
    return verdict, max(known, default=math.nan)


def _collect(criterion: Criterion, seeds: Sequence[int]) -> tuple[dict[int, float], dict[int, str]]:
    values, missing = {}, {}
    for seed in seeds:
        try:
            values[seed] = criterion.effect(seed)
        except MissingError as error:
            missing[seed] = str(error)
    return values, missing


def _finding(
    criterion: Criterion,
    values: Mapping[int, float],
    p: float,
    against: float,
    verdict: Verdict,
    notes: list[str],
) -> Finding:
    known = list(values.values())
    numbers = [float(np.mean(known)) if known else math.nan, *interval(known), criterion.margin]
    # the test and the interval use logarithms; back-transformed, the mean is the geometric mean of the ratios
    if criterion.is_log_ratio:
        numbers = [math.exp(number) for number in numbers]
        values = {seed: math.exp(value) for seed, value in values.items()}
    estimate, low, high, margin = numbers
    rule = f"{'<' if criterion.below else '>'} {margin:g}"
    return Finding(
        criterion.words, criterion.unit, rule, estimate, low, high, len(known),
        p, against, verdict, "; ".join(notes), values,
    )  # fmt: skip
