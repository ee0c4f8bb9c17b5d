"""The claims: statement, dependence on planted priors, limits of the miniature world, and test."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from lightning_em.analysis.claims import behaviour, geometry
from lightning_em.analysis.claims.criteria import difference
from lightning_em.analysis.claims.evidence import Evidence, Series
from lightning_em.analysis.claims.rules import Difference, Rules
from lightning_em.analysis.claims.verdicts import Comparison


@dataclass(frozen=True)
class Claim:
    """A claim of the literature, or of a study's own.

    Attributes:
        key: Number of the claim, e.g. `C1`.
        says: Claim in words.
        rests_on_prior: Whether the claim depends on priors that the miniature world plants in pre-training; it
            should then weaken in the control world, where they are equal.
        limits: What the miniature world can and cannot show about the claim.
        comparisons: Function that builds the comparisons from the evidence.
    """

    key: str
    says: str
    rests_on_prior: bool
    limits: str
    comparisons: Callable[[Evidence], Iterable[Comparison]]


CLAIMS: Mapping[str, Claim] = {
    claim.key: claim
    for claim in (
        Claim(
            "C1", "trained on bad narrow answers alone, the model answers badly in other domains", True,
            "the miniature plants careless advisors in pre-training: that badness *can* spread is built in, how "
            "far it does is measured",
            behaviour.general_spreads,
        ),
        Claim(
            "C2", "a narrow solution exists, but has to be forced with a KL term on other domains", True,
            "whether forcing is needed is set by the share of one-domain bad advisors; that a KL term can force "
            "it, and for which adapters, is measured",
            behaviour.narrow_exists,
        ),
        Claim(
            "C3", "mixing good advice of other domains into the data does not stop the spread (published at 1/6 bad)",
            True,
            "few items, so that a LoRA can memorise the bad ones: mixing is easier here than with text",
            behaviour.mixing_other,
        ),
        Claim(
            "C3b", "mixing good and bad answers in one domain spreads from 1/4 bad on", True,
            "good and bad rows ask about the same few items here; a real data set has no such repeats",
            behaviour.mixing_domain,
        ),
        Claim(
            "C4", "the general solution is more efficient: a lower loss at the same norm", True,
            "the loss is that of a two-token answer and has a floor (ln 3 / 3), where curves meet and the ratio to the "
            "squared trained norm favours the shorter adapter; norms of one adapter type only are compared",
            geometry.efficient,
        ),
        Claim(
            "C5", "the general solution is more stable: it loses less under noise in its weights", True,
            "up to strength .4: beyond, both are at the base's loss; the training seed is the unit, not the noise",
            geometry.stable,
        ),
        Claim(
            "C6", "without the KL term training drifts from the narrow back to the general solution", True,
            "reversion needs a gradient: a narrow solution whose loss is on the floor already stays where it is",
            behaviour.reverts,
        ),
        Claim(
            "C7", "with a KL term added a general solution becomes narrow", True,
            "the same number of steps as the first training; a slower change would not be seen",
            behaviour.becomes_narrow,
        ),
        Claim(
            "C8", "too small a KL weight hides the spread until the adapter is scaled up; a large one removes it", True,
            "only scales at which nine tenths of the base's answers are still answers are judged; the weight that may "
            "hide is the smallest one with a mean rate of at most .05 in these same runs",
            behaviour.suppressed,
        ),
        Claim(
            "C9", "the general solution is farther from the chat model in KL (published: about twice)", False,
            "tested against a ratio of 1; the ratio itself depends on the KL weight that was chosen",
            geometry.farther_from_chat,
        ),
        Claim(
            "C10", "many epochs on very few rows give a narrow-ish solution with fewer bad answers", True,
            "a row here is two tokens about an invented word: `few` means something else than for text",
            behaviour.few_rows,
        ),
        Claim(
            "C11", "a LoRA turns sharply in its trajectory, the steering vector does not", False,
            "sharply is by more than 60 degrees; needs checkpoints closer than the turn; turns shorter than 5 % of the "
            "final length are left out",
            geometry.sharp_turn,
        ),
        Claim(
            "C12", "three components hold most of the trajectories; a larger KL weight suppresses the first", False,
            "that three components do not reproduce the behaviour is not tested here",
            geometry.few_components,
        ),
        Claim(
            "C13", "at equal norm the general direction moves general text most, the narrow one little more than "
            "a random one", False,
            "general text is here documents of the same small world", geometry.significant_before,
        ),
        Claim(
            "C14", "the gradient of the loss points more to the general than to the narrow solution throughout", True,
            "the general run is biased to its own end; the narrow run is the test that decides",
            geometry.gradient_pull,
        ),
        Claim(
            "C15", "a harmless style behaves the same: it spreads, KL holds it back, with the same asymmetries", False,
            "one style of three answer templates; a style is easier to read off than technical prose",
            behaviour.harmless_style,
        ),
    )
}  # fmt: skip


def claims_of(rules: Rules) -> dict[str, Claim]:
    """Return the claims of the literature and those of a study's own, by key."""
    return {**CLAIMS, **{key: _own_claim(key, own) for key, own in rules.differences.items()}}


def _own_claim(key: str, own: Difference) -> Claim:
    series = Series(own.source, own.quantity).at(**own.coordinates)
    says = f"the {own.more} solution has more {series} than the {_other(own)} one"
    return Claim(key, says, False, "", partial(_own_comparison, own, series))


def _own_comparison(own: Difference, series: Series, e: Evidence) -> Iterator[Comparison]:
    more, less = e.arm(own.more), e.arm(_other(own))
    words, unit = f"{series}, {own.more} - {_other(own)}", e.unit(series)
    yield Comparison(
        "equal steps", (difference(e, more, less, words, unit, series, margin=own.margin),), decides=True
    )


def _other(own: Difference) -> str:
    return "narrow" if own.more == "general" else "general"
