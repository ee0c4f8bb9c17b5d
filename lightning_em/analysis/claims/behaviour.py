"""Tests of the claims about the answers of the solutions."""

from collections.abc import Iterable

from lightning_em.analysis.claims.criteria import (
    PROBABILITY,
    cheaper_at_norm,
    gap,
    hidden,
    is_narrow,
    mean_rate,
    never,
    reading,
    rises,
    steadier,
)
from lightning_em.analysis.claims.effects import (
    HELD_OUT,
    SEEN,
    UNSEEN,
    ScaleOf,
    above_base,
    as_trained,
    settings,
)
from lightning_em.analysis.claims.evidence import (
    Arm,
    Evidence,
    Series,
)
from lightning_em.analysis.claims.verdicts import (
    Comparison,
    Criterion,
    MissingError,
)


def general_spreads(e: Evidence) -> Iterable[Comparison]:
    """C1: trained on bad narrow answers alone, the model answers badly in other domains."""
    general = e.arm("general")
    for name, at in settings(e, general, "narrow"):
        yield Comparison(
            name, (rises(e, general, HELD_OUT, at, e.rules.margin("rise")),), decides=at is as_trained
        )


def narrow_exists(e: Evidence) -> Iterable[Comparison]:
    """C2: a narrow solution exists, but must be forced with a KL term on other domains.

    The in-training defense of arXiv:2508.06249 is reported as a control.
    """
    narrow, general = e.arm("narrow"), e.arm("general")
    for name, at in settings(e, narrow, "general"):
        forced = gap(e, general, narrow, HELD_OUT, at, e.rules.margin("rise"))
        yield Comparison(name, (*is_narrow(e, narrow, at), forced), decides=at is as_trained)
    on_narrow = e.arms("kl_on_narrow")
    for arm in on_narrow:
        # control: the same KL term on the prompts that have bad answers (the defense of arXiv:2508.06249)
        yield Comparison(f"control: KL on the narrow prompts, {arm}", is_narrow(e, arm, as_trained))


def mixing_other(e: Evidence) -> Iterable[Comparison]:
    """C3: mixing good advice of other domains into the data does not stop the spread."""
    return _mixed(e, "mixed_other", 1 / 6)


def mixing_domain(e: Evidence) -> Iterable[Comparison]:
    """C3b: mixed good and bad answers in one domain spread from 1/4 bad answers on."""
    return _mixed(e, "mixed_domain", 1 / 4)


def _mixed(e: Evidence, role: str, share: float) -> Iterable[Comparison]:
    """Test whether a mixed arm answers badly in held-out domains more often than the base model; this decides.

    Mixing also lowers the narrow rate, and with it the spread. To test whether mixing reduces the spread beyond
    that, the general run is compared at the same narrow rate or norm: its rate of bad answers may exceed that of
    the mixed arm by the margin at most.
    """
    nearest, rise = e.arm(role, near=share), e.rules.margin("rise")
    for arm in (nearest, *(arm for arm in e.arms(role) if arm != nearest)):
        spreads = rises(e, arm, HELD_OUT, as_trained, rise)
        yield Comparison(f"equal steps, {arm}", (spreads,), decides=arm == nearest)
    general = e.arm("general", required=False)
    for name, at in settings(e, general, nearest):
        if name != "equal steps":
            held_back = gap(e, general, nearest, HELD_OUT, at, rise, below=True)
            against = f"held back no further than the general run at {name}, {nearest}"
            yield Comparison(against, (held_back,))


def reverts(e: Evidence) -> Iterable[Comparison]:
    """C6: without the KL term, training drifts from the narrow back to the general solution."""
    reverted, narrow = e.arm("reverted"), e.arm("narrow")
    covered = reading(
        e,
        reverted,
        "share of the distance back to the general solution",
        "share",
        Series("distance", "covered"),
    )
    for name, at in settings(e, reverted, "narrow"):
        behaviour, decides = (
            gap(e, reverted, narrow, HELD_OUT, at, e.rules.margin("narrow")),
            at is as_trained,
        )
        yield Comparison(name, (behaviour, covered) if decides else (behaviour,), decides)


def becomes_narrow(e: Evidence) -> Iterable[Comparison]:
    """C7: with a KL term added, a general solution becomes narrow."""
    reverse, general = e.arm("reverse"), e.arm("general")
    for name, at in settings(e, reverse, "general"):
        forced = gap(e, general, reverse, HELD_OUT, at, e.rules.margin("rise"))
        yield Comparison(name, (*is_narrow(e, reverse, at), forced), decides=at is as_trained)


def suppressed(e: Evidence) -> Iterable[Comparison]:
    """C8: too small a KL weight hides the spread until the adapter is scaled up; a large one removes it.

    The hiding weight is the smallest one whose mean rate at scale 1 is at most the margin. Only weights with all
    seeds of the narrow arm are candidates: a weight with fewer seeds could be chosen but might not allow a verdict.
    """
    seeds = {seed for arm in e.arms("narrow") for seed in e.seeds_of(arm)}
    weights = [
        arm
        for arm in e.arms("narrow", "narrow_weight")
        if arm.level is not None and seeds <= set(e.seeds_of(arm))
    ]
    if len(weights) < 2:
        raise MissingError("the study has fewer than two KL weights")
    weights.sort(key=lambda arm: arm.level or 0.0)
    margin = e.rules.margin("narrow")
    hiding = [arm for arm in weights[:-1] if mean_rate(e, arm) <= margin]
    if not hiding:
        raise MissingError(f"no KL weight below the largest brings the rate at scale 1 to {margin:g}")
    small, large = hiding[0], weights[-1]  # weights are in ascending order
    both = (hidden(e, small), *never(e, large, beside=small))
    yield Comparison(f"KL weights {small.level:g} and {large.level:g}", both, decides=True)
    for arm in weights[:-1]:
        if arm != small:
            yield Comparison(f"KL weight {arm.level:g}", (hidden(e, arm),))
    yield Comparison("the general run, for comparison", (hidden(e, e.arm("general", required=False)),))


def few_rows(e: Evidence) -> Iterable[Comparison]:
    """C10: many epochs on very few rows give a narrow-ish solution with fewer bad answers."""
    arms, general = e.arms("few_rows"), e.arm("general")
    if not arms:
        e.arm("few_rows")  # raises MissingError with its message
    for name, at in settings(e, arms[0], "general"):
        yield _few(e, arms[0], general, name, at, decides=at is as_trained)
    for arm in arms[1:]:
        yield _few(e, arm, general, "equal steps", as_trained)


def _few(e: Evidence, few: Arm, general: Arm, name: str, at: ScaleOf, decides: bool = False) -> Comparison:
    def narrowness(seed: int) -> float:
        run = e.run(few, seed)
        return above_base(run, SEEN, at(few, seed)) - above_base(run, HELD_OUT, at(few, seed))

    words = (
        "bad answers to new narrow questions about trained words - in held-out domains, both above the base"
    )
    return Comparison(
        f"{name}, {few}",
        (
            gap(e, general, few, HELD_OUT, at, e.rules.margin("rise")),
            Criterion(words, PROBABILITY, narrowness),
            gap(e, general, few, UNSEEN, at, 0.0),
        ),
        decides,
    )


def harmless_style(e: Evidence) -> Iterable[Comparison]:
    """C15: a harmless style behaves the same: it spreads, KL holds it back, with the same asymmetries."""
    general, narrow = e.arm("harmless_general"), e.arm("harmless_narrow")
    style, rise = Series("behaviour", "style_rate"), e.rules.margin("rise")
    for name, at in settings(e, general, "harmless_narrow", style):
        spreads = rises(e, general, HELD_OUT, at, rise, style)
        forced = gap(e, general, narrow, HELD_OUT, at, rise, style)
        learned = rises(e, narrow, SEEN, at, rise, style)
        asymmetries = (
            (cheaper_at_norm(e, general, narrow), steadier(e, general, narrow)) if at is as_trained else ()
        )
        yield Comparison(name, (spreads, forced, learned, *asymmetries), decides=at is as_trained)
