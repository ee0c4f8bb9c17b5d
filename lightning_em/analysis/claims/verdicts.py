"""From one number a seed to a verdict: the interval, the exact test, the rule."""

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
"""Number of one seed; NaN where it is measured but undefined. Raises `MissingError` where it is not measured."""


class MissingError(LookupError):
    """No run of the study recorded what a claim needs; the message says what."""


@dataclass(frozen=True)
class Criterion:
    """One thing a claim says: an effect lies above a margin, or below it.

    Attributes:
        words: The effect, for the reader.
        unit: Of the effect.
        effect: The effect of one seed.
        margin: The effect must be larger than this.
        below: It must be smaller instead.
        is_log_ratio: The effect is the logarithm of a ratio, and the ratio is what is shown.
    """

    words: str
    unit: str
    effect: Effect
    margin: float = 0.0
    below: bool = False
    is_log_ratio: bool = False


@dataclass(frozen=True)
class Comparison:
    """One way to put a claim to the test: all of its criteria must hold.

    Attributes:
        name: Name of the way.
        criteria: What it says.
        decides: Its verdict is the claim's; exactly one comparison of a claim decides.
        headline: Position of the criterion whose estimate stands in the tables.
    """

    name: str
    criteria: tuple[Criterion, ...]
    decides: bool = False
    headline: int = 0


@dataclass(frozen=True)
class Finding:
    """A criterion, measured.

    Attributes:
        words: The effect, for the reader.
        unit: Of all the numbers.
        rule: What the claim says of the effect, e.g. `> 0.1`.
        estimate: Mean over seeds, geometric for a ratio; NaN if not measured.
        low: Lower end of the 95 % t interval over seeds; NaN for fewer than two.
        high: Upper end.
        n: Seeds with a number.
        p: Probability of a mean so far on the claim's side of the margin by chance.
        p_against: Of one so far on the other side.
        verdict: By the rule of `judge`.
        note: Seeds without a number, and why there can be no verdict.
        values: The effect by seed.
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
        """Whether so many seeds could give a verdict."""
        return 0.5**self.n <= SIGNIFICANCE


def sign_flip_p(effects: Sequence[float]) -> float:
    """Probability of a mean at least this large if each effect were as likely to have the other sign.

    Exact: all 2^n signs. Five positive effects give 1/32 = .031, the least that five can give.

    Raises:
        ValueError: If there are more than `MOST_SEEDS` effects.
    """
    if not 0 < len(effects) <= MOST_SEEDS:
        raise ValueError(f"the exact test takes 1 to {MOST_SEEDS} seeds, got {len(effects)}.")
    values = np.asarray(effects, dtype=float)
    flips = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    sums = ((1 - 2 * flips) * values).sum(axis=1)
    observed = values.sum()
    return float(np.mean(sums >= observed - 1e-9 * np.abs(values).sum()))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t interval of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(special.stdtrit(len(values) - 1, 0.975)) * error
    return mean - half, mean + half


def judge(criterion: Criterion, seeds: Sequence[int]) -> Finding:
    """Measure one criterion over seeds.

    `holds` if the mean is on the claim's side of the margin with p <= .05, `does not hold` if it is on the
    other side with p <= .05, otherwise `undecided`; also undecided if the effect is undefined in a seed, which
    may be no accident.
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
    """Verdict and p of a claim that says several things at once: all of them must hold.

    p is the largest one, so that *holds* needs no correction (intersection-union). *Does not hold* has none: the
    opposite of any one criterion at p <= .05 is enough, the likelier by chance the more a claim says.
    """
    verdicts = {finding.verdict for finding in findings}
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
    if criterion.is_log_ratio:
        numbers = [math.exp(number) for number in numbers]
        values = {seed: math.exp(value) for seed, value in values.items()}
    estimate, low, high, margin = numbers
    rule = f"{'<' if criterion.below else '>'} {margin:g}"
    return Finding(
        criterion.words, criterion.unit, rule, estimate, low, high, len(known),
        p, against, verdict, "; ".join(notes), values,
    )  # fmt: skip
