"""The numbers that claims are made of, each for one run or for two of one seed."""

import math
from collections.abc import Callable, Iterator

from lightning_em.analysis.claims.evidence import Arm, Curve, Evidence, RunNumbers
from lightning_em.analysis.claims.verdicts import MissingError

SEEN = "narrow_seen"
UNSEEN = "narrow_held_out"
HELD_OUT = "held_out_domain"
LEAST_COHERENCE = 0.9
RISE_UNDER_NOISE = "perturbation/ce_increase"
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


def settings(
    e: Evidence, first: Arm, second: Arm | str, name: str = "bad_rate"
) -> Iterator[tuple[str, ScaleOf]]:
    """The three ways to compare two arms: as they were trained, at one narrow rate, at one effective norm.

    At matched narrow rate the one that answers more questions of the narrow set badly is scaled down until both
    do so equally often, as little as it takes; at equal effective norm the longer one is. The other stays as it was
    trained.
    """

    def matched(arm: Arm, seed: int) -> float:
        seen = f"{name}/{SEEN}"
        least = min(run.curve(seen).at(1.0) for run in e.alike((first, second), seed, seen))
        curve = e.run(arm, seed).curve(seen)
        return 1.0 if curve.at(1.0) <= least else curve.last_reaches(least, 1.0)

    def equal(arm: Arm, seed: int) -> float:
        return common_norm(e, first, second, seed) / e.run(arm, seed).value("effective_norm")

    yield "equal steps", as_trained
    yield "matched narrow rate", matched
    yield "equal effective norm", equal


def common_norm(e: Evidence, first: Arm, second: Arm | str, seed: int) -> float:
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
            found |= set(e.run(arm, seed).curve(RISE_UNDER_NOISE).places)
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


def under_noise(run: RunNumbers, quantity: str) -> float:
    """A quantity of the noise; NaN where noise was measured, but there is nothing to relate its harm to.

    An adapter that gains nothing has no share of its gain to lose.
    """
    try:
        return run.value(quantity)
    except MissingError:
        run.value(f"{RISE_UNDER_NOISE}@{quantity.rpartition('@')[2]}")  # missing if noise was not measured
        return math.nan


def displacement(run: RunNumbers, strength: float) -> float:
    """Effective norm of (perturbed update - update), mean over the noise."""
    return run.curve("perturbation/displacement").at(strength)


def rise_at(run: RunNumbers, length: float) -> float:
    """Rise of the loss under noise that moves the update by an effective norm.

    Linear between the squares of the measured displacements, 0 included, which is exact for a rise that goes with
    the square, as near a minimum.
    """
    rise = run.curve(RISE_UNDER_NOISE)
    squares = [displacement(run, strength) ** 2 for strength in rise.places]
    known = sorted([(0.0, 0.0), *zip(squares, rise.values, strict=True)])
    places, values = zip(*known, strict=True)
    return Curve(places, values).at(length**2)


def optimum(run: RunNumbers, quantity: str) -> float:
    """A quantity of the lowest point of the scale curve; NaN where that is the edge of what was measured."""
    return run.value(quantity) if run.value("optimum_inside_grid") else math.nan


def coherent_scales(run: RunNumbers) -> list[float]:
    """Scales above 1 at which at least nine tenths of the base's answers are still answers, good or bad."""
    scales = run.curve(f"other_rate/{HELD_OUT}").places
    return [scale for scale in scales if scale > 1 and is_coherent(run, scale)]


def is_coherent(run: RunNumbers, scale: float) -> bool:
    """Whether at least nine tenths of the base's answers are still answers at a scale."""
    other = run.curve(f"other_rate/{HELD_OUT}")
    least = LEAST_COHERENCE * (1 - run.value(f"other_rate/{HELD_OUT}@0"))
    return 1 - other.at(scale) >= least


def highest_rate(run: RunNumbers) -> float:
    """Largest bad rate in held-out domains beyond scale 1 where answers are coherent; NaN if none are."""
    return max((rate(run, HELD_OUT, scale) for scale in coherent_scales(run)), default=math.nan)
