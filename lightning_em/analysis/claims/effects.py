"""The numbers that claims are made of, each for one run or for two of one seed."""

import math
from collections.abc import Callable, Iterator

from lightning_em.analysis.claims.evidence import Arm, Curve, Evidence, RunNumbers
from lightning_em.analysis.claims.verdicts import MissingError

SEEN = "narrow_seen"
UNSEEN = "narrow_held_out"
HELD_OUT = "held_out_domain"
LEAST_COHERENCE = 0.9
STABILITY_STRENGTHS = 0.4
"""Noise above this strength brings any solution to the base's loss, where nothing can be compared."""

ScaleOf = Callable[[Arm, int], float]
"""Scale at which an arm's run of a seed is looked at."""


def rate(run: RunNumbers, kind: str, scale: float = 1.0, name: str = "bad_rate") -> float:
    """Probability of a bad answer (or of the trained style), linear between the measured scales."""
    return run.curve(f"{name}/{kind}").at(scale)


def above_base(run: RunNumbers, kind: str, scale: float = 1.0, name: str = "bad_rate") -> float:
    """The same minus the frozen base's."""
    return rate(run, kind, scale, name) - run.value(f"{name}/{kind}@0")


def as_trained(_arm: Arm, _seed: int) -> float:
    """Scale of the trained adapter."""
    return 1.0


def settings(e: Evidence, first: Arm, second: str, name: str = "bad_rate") -> Iterator[tuple[str, ScaleOf]]:
    """The three ways to compare two arms: as they were trained, at one narrow rate, at one effective norm.

    At matched narrow rate the one that answers more questions of the narrow set badly is scaled down until both
    do so equally often; at equal effective norm the longer one is.
    """

    def matched(arm: Arm, seed: int) -> float:
        curves = [e.run(a, seed).curve(f"{name}/{SEEN}") for a in (first, e.arm(second))]
        return e.run(arm, seed).curve(f"{name}/{SEEN}").reaches(min(curve.at(1.0) for curve in curves))

    def equal(arm: Arm, seed: int) -> float:
        return common_norm(e, first, e.arm(second), seed) / e.run(arm, seed).value("effective_norm")

    yield "equal steps", as_trained
    yield "matched narrow rate", matched
    yield "equal effective norm", equal


def common_norm(e: Evidence, first: Arm, second: Arm, seed: int) -> float:
    """The smaller of two trained effective norms."""
    return min(e.run(arm, seed).value("effective_norm") for arm in (first, second))


def ce_at_norm(run: RunNumbers, norm: float) -> float:
    """Training cross-entropy with the adapter scaled to an effective norm."""
    return run.curve("ce").at(norm / run.value("effective_norm"))


def log_ratio(above: float, below: float) -> float:
    """Logarithm of a ratio; NaN where one of the two is not positive."""
    return math.log(above / below) if above > 0 and below > 0 else math.nan


def strengths(e: Evidence, arm: Arm) -> list[float]:
    """Strengths of noise that are compared.

    Raises:
        MissingError: If there are none in any seed.
    """
    found: set[float] = set()
    reason = f"the study has no {arm} run of {e.adapter} in the {e.world} world"
    for seed in e.seeds:
        try:
            found |= set(e.run(arm, seed).curve("perturbation/lost_gain").places)
        except MissingError as error:
            reason = str(error)
    if not found:
        raise MissingError(reason)
    compared = sorted(strength for strength in found if strength <= STABILITY_STRENGTHS)
    if not compared:
        raise MissingError(
            f"noise was measured from strength {min(found):g} on, beyond {STABILITY_STRENGTHS:g}"
        )
    return compared


def displacement(strength: float) -> float:
    """Length of x' - x for x' = sqrt(1 - e^2) x + e y, in units of the length of x = that of y, y orthogonal."""
    return math.sqrt(2 - 2 * math.sqrt(1 - strength**2))


def increase_at(run: RunNumbers, length: float) -> float:
    """Rise of the loss under noise that moves the adapter by a length, in units of the effective norm."""
    curve, norm = run.curve("perturbation/ce_increase"), run.value("effective_norm")
    places = (0.0, *(displacement(strength) * norm for strength in curve.places))
    return Curve(places, (0.0, *curve.values)).at(length)


def coherent_scales(run: RunNumbers) -> list[float]:
    """Scales above 1 at which at least nine tenths of the base's answers are still answers, good or bad."""
    other = run.curve(f"other_rate/{HELD_OUT}")
    least = LEAST_COHERENCE * (1 - run.value(f"other_rate/{HELD_OUT}@0"))
    return [s for s, value in zip(other.places, other.values, strict=True) if s > 1 and 1 - value >= least]


def highest_rate(run: RunNumbers) -> float:
    """Largest bad rate in held-out domains beyond scale 1 where answers are coherent; NaN if none are."""
    return max((rate(run, HELD_OUT, scale) for scale in coherent_scales(run)), default=math.nan)
