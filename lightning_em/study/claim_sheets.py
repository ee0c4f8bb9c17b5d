"""The verdicts as tables: one row a claim, one column an adapter type."""

import math
from collections.abc import Mapping, Sequence

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.analysis.claims import CLAIMS, ClaimResult
from lightning_em.study.sheet import NOTHING, Sheet, number, probability

HOW_TO_READ = (
    "Estimates are means over training seeds with 95 % t intervals over seeds; p is that of a one-sided exact "
    "sign-flip test of the mean over n seeds, paired by seed, the largest p of all a claim says (five agreeing seeds "
    "give .031, the least that five can give; not corrected for the number of claims). *Holds*: p <= .05. *Does not "
    "hold*: p <= .05 for the opposite of something it says. *Undecided*: neither. The estimate is that of the first "
    "thing a claim says; the others stand below it where they keep the claim from holding. The number behind an arm is "
    "its KL weight in nats per token, its share of bad rows, or its number of rows."
)
_OTHER_WORLD = "The same study where the planted prior is turned round; read like the table above."
MINIATURE = (
    "The miniature is a toy that plants its asymmetry in the pre-training mixture: it tests whether the instruments "
    "see an asymmetry that is there, not whether real models have one."
)


def verdict_sheet(results: Sequence[ClaimResult], world: str) -> Sheet:
    """One row a claim: what it says, what was measured, and the verdict for each adapter type."""
    adapters = _adapters(results, world)
    rows = []
    for key, claim in CLAIMS.items():
        own = {r.adapter: r for r in results if (r.claim, r.world) == (key, world) and r.decides}
        if not own:
            continue
        mark = "" if world == DEFAULT_WORLD or not claim.rests_on_prior else " *(must not hold here)*"
        says = f"**{key}** {claim.says}{mark}"
        named = len({r.comparison for r in own.values() if r.findings}) > 1
        cells = (_verdict_cell(own.get(adapter), named) for adapter in adapters)
        rows.append((says, _measured(list(own.values())), *cells))
    caption = HOW_TO_READ if world == DEFAULT_WORLD else _OTHER_WORLD
    return Sheet(f"Claims in the {world} world", ("claim", "measured", *adapters), tuple(rows), caption)


def comparison_sheet(results: Sequence[ClaimResult], world: str) -> Sheet:
    """The other ways to compare the same runs, which do not decide."""
    adapters = _adapters(results, world)
    own = [r for r in results if r.world == world]
    rows = []
    for key in CLAIMS:
        names = dict.fromkeys(r.comparison for r in own if r.claim == key and r.comparison != NOTHING)
        for name in names:
            found = {r.adapter: r for r in own if (r.claim, r.comparison) == (key, name)}
            rows.append(
                (
                    f"{key} {name}",
                    _measured(list(found.values())),
                    *(_short_cell(found.get(a)) for a in adapters),
                )
            )
    return Sheet(
        f"All comparisons, {world} world", ("comparison", "measured", *adapters), tuple(rows),
        "The first comparison of a claim decides; a claim that holds in one comparison only should be read so.",
        is_detail=True,
    )  # fmt: skip


def limits_sheet() -> Sheet:
    """What the miniature can and cannot say about each claim."""
    rows = tuple((key, claim.says, claim.limits) for key, claim in CLAIMS.items())
    return Sheet(
        "What the miniature can and cannot say of each claim",
        ("", "claim", "limit"),
        rows,
        MINIATURE,
        is_detail=True,
    )


def control_reading(results: Sequence[ClaimResult], world: str) -> list[str]:
    """For a world in which planted claims must fail: which do, which do not, in sentences."""
    cells = [
        r for r in results if r.world == world and r.decides and CLAIMS[r.claim].rests_on_prior
    ]  # fmt: skip
    groups: dict[str, dict[str, list[str]]] = {}
    for result in cells:
        groups.setdefault(result.verdict, {}).setdefault(result.claim, []).append(result.adapter)
    words = {
        "does not hold": "As they must, these do not hold here",
        "holds": "**Against expectation these hold here too**, so that the prior alone is not what makes them hold",
        "undecided": "Undecided here",
        "not measured": "Not run or not measured here",
    }
    return [f"{words[verdict]}: {_listed(groups[verdict])}." for verdict in words if verdict in groups]


def _listed(adapters: Mapping[str, Sequence[str]]) -> str:
    """`C1 (rank32, vector), C2 (rank32)` in the order of the claims."""
    return ", ".join(f"{key} ({', '.join(adapters[key])})" for key in CLAIMS if key in adapters)


def _adapters(results: Sequence[ClaimResult], world: str) -> list[str]:
    return list(dict.fromkeys(r.adapter for r in results if r.world == world))


def _measured(results: Sequence[ClaimResult]) -> str:
    """The first thing that is measured, in the words of the first adapter that has it."""
    first = next((r.findings[0] for r in results if r.findings), None)
    return NOTHING if first is None else f"{first.words} ({first.unit}), {first.rule}"


def _verdict_cell(result: ClaimResult | None, named: bool) -> str:
    if result is None:
        return NOTHING
    if result.verdict == "not measured":
        return f"not measured: {result.note}"
    p = NOTHING if math.isnan(result.p) else probability(result.p)
    note = f"\n{result.note}" if result.note else ""
    name = f" ({result.comparison})" if named else ""
    return f"**{result.verdict}**{name} {_estimate(result)}, n {result.n}, p {p}{note}"


def _short_cell(result: ClaimResult | None) -> str:
    if result is None:
        return NOTHING
    return f"{result.verdict} {_estimate(result)}" if result.n else result.verdict


def _estimate(result: ClaimResult) -> str:
    numbers = [number(value, result.unit) for value in (result.estimate, result.low, result.high)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
