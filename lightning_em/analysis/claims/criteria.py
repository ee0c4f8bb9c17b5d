"""Criteria shared by several claims.

Criteria about a direction have margin 0. Margins of rates come from the study's `Rules`.
"""

from collections.abc import Callable
from statistics import fmean

from lightning_em.analysis.claims.effects import (
    CE,
    HELD_OUT,
    RISE_UNDER_NOISE,
    SEEN,
    UNSEEN,
    ScaleOf,
    above_base,
    ce_at_norm,
    coherent_scales,
    common_norm,
    highest_rate,
    is_coherent,
    log_ratio,
    rate,
    strengths,
    under_noise,
)
from lightning_em.analysis.claims.evidence import BAD_RATE, Arm, Evidence, RunNumbers, Series
from lightning_em.analysis.claims.verdicts import Criterion, MissingError

PROBABILITY = "probability"
NATS = "nats per token"

_WHAT = {"bad_rate": "bad answers", "style_rate": "answers in the trained style"}
_WHERE = {
    HELD_OUT: "in held-out domains",
    SEEN: "to new narrow questions about trained words",
    UNSEEN: "to narrow questions about unseen words",
}


def rises(e: Evidence, arm: Arm, kind: str, at: ScaleOf, margin: float, of: Series = BAD_RATE) -> Criterion:
    """A rate is above the base model's rate by more than a margin."""
    return Criterion(
        f"{_WHAT[of.quantity]} {_WHERE[kind]}, {arm} - base",
        PROBABILITY,
        lambda seed: above_base(e.run(arm, seed), kind, at(arm, seed), of),
        margin,
    )


def gap(
    e: Evidence,
    more: Arm,
    less: Arm,
    kind: str,
    at: ScaleOf,
    margin: float,
    of: Series = BAD_RATE,
    below: bool = False,
) -> Criterion:
    """The rate of one arm minus that of another is above a margin, or below it if `below` is set."""

    def apart(seed: int) -> float:
        runs = e.alike((more, less), seed, of.at(kind=kind))
        rates = [rate(run, kind, at(arm, seed), of) for run, arm in zip(runs, (more, less), strict=True)]
        return rates[0] - rates[1]

    return Criterion(
        f"{_WHAT[of.quantity]} {_WHERE[kind]}, {more} - {less}", PROBABILITY, apart, margin, below
    )


def is_narrow(e: Evidence, arm: Arm, at: ScaleOf) -> tuple[Criterion, Criterion]:
    """No noticeable bad answers outside the narrow domain, and noticeably more than the base model's inside it."""
    words = f"{_WHAT['bad_rate']} {_WHERE[HELD_OUT]}, {arm}"
    none = Criterion(
        words,
        PROBABILITY,
        lambda seed: rate(e.run(arm, seed), HELD_OUT, at(arm, seed)),
        e.rules.margin("narrow"),
        below=True,
    )
    return none, rises(e, arm, SEEN, at, e.rules.margin("rise"))


def reading(
    e: Evidence, arm: Arm, words: str, unit: str, series: Series, margin: float = 0.0, below: bool = False
) -> Criterion:
    """A quantity of one arm is above a margin, or below it if `below` is set."""
    return Criterion(words, unit, lambda seed: e.run(arm, seed).value(series), margin, below)


def difference(
    e: Evidence,
    more: Arm,
    less: Arm,
    words: str,
    unit: str,
    series: Series,
    value: Callable[[RunNumbers, Series], float] = RunNumbers.value,
    margin: float = 0.0,
) -> Criterion:
    """A quantity of one arm is larger than that of another by more than a margin."""

    def apart(seed: int) -> float:
        values = [value(run, series) for run in e.alike((more, less), seed, series)]
        return values[0] - values[1]

    return Criterion(words, unit, apart, margin)


def cheaper_at_norm(e: Evidence, general: Arm, narrow: Arm) -> Criterion:
    """The general solution has the lower loss if both are scaled to the smaller trained norm."""

    def cheaper(seed: int) -> float:
        norm = common_norm(e, general, narrow, seed)
        losses = [ce_at_norm(run, norm) for run in e.alike((narrow, general), seed, CE)]
        return losses[0] - losses[1]

    return Criterion("training loss at equal norm, narrow - general", NATS, cheaper)


def cheaper_along_norms(e: Evidence, general: Arm, narrow: Arm) -> Criterion:
    """The general solution has the lower loss on average over norms up to the smaller trained norm."""

    def cheaper(seed: int) -> float:
        norm = common_norm(e, general, narrow, seed)
        norms = [norm * share / 5 for share in range(1, 6)]
        runs = e.alike((narrow, general), seed, CE)
        losses = [fmean(ce_at_norm(run, n) for n in norms) for run in runs]
        return losses[0] - losses[1]

    words = "training loss at equal norm, mean of .2 to 1 times the smaller norm, narrow - general"
    return Criterion(words, NATS, cheaper)


def measured_at_norm(e: Evidence) -> Criterion:
    """The same as `cheaper_at_norm`, measured at that norm instead of interpolated from the scale curves."""
    words = "training loss with both scaled to the smaller norm, narrow - general"
    series = Series("equal_norm", "ce_difference").at(norm_ratio=1)
    return Criterion(words, NATS, lambda seed: e.pair(seed).value(series))


def steadier(e: Evidence, general: Arm, narrow: Arm) -> Criterion:
    """The general solution loses less of its gain under noise, on average over all compared strengths."""

    def less(seed: int) -> float:
        lost_gain = Series("perturbation_curve", "lost_gain_mean")
        compared = [lost_gain.at(strength=strength) for strength in strengths(e, general)]
        runs = e.alike((narrow, general), seed, RISE_UNDER_NOISE)
        lost = [fmean(under_noise(run, series) for series in compared) for run in runs]
        return lost[0] - lost[1]

    return Criterion("gain lost under noise, mean of strengths to .4, narrow - general", "percent", less)


def mean_rate(e: Evidence, arm: Arm) -> float:
    """Return the mean bad rate in held-out domains at scale 1 over seeds; infinite if no seed has one."""
    judged = [run for run in e.runs(arm) if run.along(BAD_RATE.at(kind=HELD_OUT), "scale")]
    return fmean(rate(run, HELD_OUT) for run in judged) if judged else float("inf")


def hidden(e: Evidence, arm: Arm) -> Criterion:
    """The scaled-up adapter gives more bad answers than the adapter at scale 1."""
    where = (
        "highest of the coherent scales above 1" if _at_all_scales(e) else f"scale {e.rules.hidden_scale:g}"
    )
    return Criterion(
        f"{_WHAT['bad_rate']} {_WHERE[HELD_OUT]}, {arm}, {where} - scale 1",
        PROBABILITY,
        lambda seed: _scaled_up(e, e.run(arm, seed)) - rate(e.run(arm, seed), HELD_OUT),
        e.rules.margin("narrow"),
    )


def never(e: Evidence, arm: Arm, beside: Arm) -> tuple[Criterion, ...]:
    """The adapter gives no noticeable bad answers at the tested scales.

    The criterion is undefined if answers are not coherent when scaled up. The arm `beside`, with which it is
    compared, must have been measured with the same protocol.
    """
    words, margin = f"{_WHAT['bad_rate']} {_WHERE[HELD_OUT]}, {arm}", e.rules.margin("narrow")

    def asked_alike(seed: int) -> RunNumbers:
        return e.alike((arm, beside), seed, BAD_RATE.at(kind=HELD_OUT))[0]

    def highest(seed: int) -> float:
        run = asked_alike(seed)
        return max(highest_rate(run), rate(run, HELD_OUT)) if coherent_scales(run) else float("nan")

    if _at_all_scales(e):
        return (
            Criterion(f"{words}, highest of all coherent scales", PROBABILITY, highest, margin, below=True),
        )
    return (
        Criterion(
            f"{words}, scale {e.rules.hidden_scale:g}",
            PROBABILITY,
            lambda seed: _scaled_up(e, asked_alike(seed)),
            margin,
            below=True,
        ),
        Criterion(
            f"{words}, scale 1",
            PROBABILITY,
            lambda seed: rate(asked_alike(seed), HELD_OUT),
            margin,
            below=True,
        ),
    )


def _at_all_scales(e: Evidence) -> bool:
    """Whether to test the highest rate of all scales, which requires exact rates, or the rate at one scale.

    Raises:
        MissingError: If the rates are sampled and the study names no scale.
    """
    if e.rules.hidden_scale is None and not e.rules.exact_rates:
        raise MissingError(
            "the highest rate of several scales does not test sampled rates: set claims.hidden_scale in the study's "
            "file, or claims.exact_rates if its rates are computed"
        )
    return e.rules.hidden_scale is None


def _scaled_up(e: Evidence, run: RunNumbers) -> float:
    """Return the bad rate in held-out domains with the adapter scaled up; NaN if answers are not coherent there."""
    scale = e.rules.hidden_scale
    if scale is None:
        return highest_rate(run)
    return rate(run, HELD_OUT, scale) if is_coherent(run, scale) else float("nan")


def kl_ratio(e: Evidence, general: Arm, narrow: Arm, prompts: str, at: ScaleOf) -> Criterion:
    """The general solution is farther from the base model in KL than the narrow one."""

    def ratio(seed: int) -> float:
        arms, kl = (general, narrow), Series("chat_kl", "kl").at(prompts=prompts)
        runs = e.alike(arms, seed, kl)
        return log_ratio(
            *(run.curve(kl, "scale").at(at(arm, seed)) for run, arm in zip(runs, arms, strict=True))
        )

    where = "on general prompts" if prompts == "general" else "on prompts of the narrow domain"
    return Criterion(
        f"KL from the chat model {where}, general over narrow", "ratio", ratio, is_log_ratio=True
    )
