"""Tables of verdicts: one row per claim, one column per adapter type."""

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.analysis.claims import CLAIMS, Claim, ClaimResult, Finding, interval, sign_flip_p
from lightning_em.study.report_table import NOTHING, ReportTable, mean, number, probability

HOW_TO_READ = (
    "A claim says one or several things, each an effect and a margin. Shown is the first, or else the one that keeps "
    "the claim from holding: its mean over training seeds and the 95 % t interval over seeds. *Holds*: each of them "
    "has p <= .05 in a one-sided exact sign-flip test of the mean over seeds, paired by seed; with five seeds that "
    "means that all five lie on the claim's side (p = .031). *Does not hold*: one of them has p <= .05 on the other "
    "side. *Undecided*: anything else, also where an effect is undefined in a seed. An interval may reach over the "
    "margin of a claim that holds, for the test is another one; nothing is corrected for the number of claims, nor a "
    "refutation for the number of things a claim says. A KL weight is the factor on the KL in nats per token."
)
_DETAILS = (
    "n seeds; p is the largest of all a claim says; what keeps it from holding stands below it, with the p that "
    "refutes where one does."
)
MINIATURE = (
    "The miniature is a toy that plants its asymmetry in the pre-training mixture: it tests whether the instruments "
    "see an asymmetry that is there, not whether real models have one."
)


def summary_table(results: Sequence[ClaimResult]) -> ReportTable:
    """Table of verdict and headline: one row per claim, one column per adapter type and world."""
    places = list(dict.fromkeys((r.world, r.adapter) for r in results))
    names = [adapter if world == DEFAULT_WORLD else f"{adapter}, {world} world" for world, adapter in places]
    rows = []
    for key, claim in _claims(results).items():
        own = {(r.world, r.adapter): r for r in results if r.claim == key and r.decides}
        cells = (_summary_cell(own.get(place)) for place in places)
        rows.append((f"**{key}** {claim.says}", _measured(list(own.values())), *cells))
    return ReportTable("The claims", ("claim", "measured", *names), tuple(rows), HOW_TO_READ)


def verdict_table(results: Sequence[ClaimResult], world: str) -> ReportTable:
    """Table of one world: for each claim its text, the measured quantity, and the verdict by adapter type."""
    adapters = _adapters(results, world)
    rows = []
    for key, claim in _claims(results).items():
        own = {r.adapter: r for r in results if (r.claim, r.world) == (key, world) and r.decides}
        if not own:
            continue
        mark = "" if world == DEFAULT_WORLD or not claim.rests_on_prior else " *(rests on the prior)*"
        says = f"**{key}** {claim.says}{mark}"
        named = len({r.comparison for r in own.values() if r.findings}) > 1
        cells = (_verdict_cell(own.get(adapter), named) for adapter in adapters)
        rows.append((says, _measured(list(own.values())), *cells))
    columns = ("claim", "measured", *adapters)
    return ReportTable(f"Claims in the {world} world", columns, tuple(rows), _DETAILS, is_detail=True)


def comparison_table(results: Sequence[ClaimResult], world: str) -> ReportTable:
    """Table of all comparisons of the same runs, including those that do not decide a claim."""
    adapters = _adapters(results, world)
    own = [r for r in results if r.world == world]
    rows = []
    for key in _claims(results):
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
    return ReportTable(
        f"All comparisons, {world} world", ("comparison", "measured", *adapters), tuple(rows),
        "The first comparison of a claim decides; a claim that holds in one comparison only should be read so.",
        is_detail=True,
    )  # fmt: skip


def limits_table() -> ReportTable:
    """Table of what the miniature can and cannot say about each claim."""
    rows = tuple((key, claim.says, claim.limits) for key, claim in CLAIMS.items())
    return ReportTable(
        "What the miniature can and cannot say of each claim",
        ("", "claim", "limit"),
        rows,
        MINIATURE,
        is_detail=True,
    )


def control_reading(results: Sequence[ClaimResult], world: str) -> list[str]:
    """Sentences on how the claims that rest on the planted prior fare in a world where the prior is weaker."""
    planted = [r for r in results if r.decides and r.spec.rests_on_prior]
    held = {(r.claim, r.adapter) for r in planted if r.world == DEFAULT_WORLD and r.verdict == "holds"}
    if not held:
        return ["No claim that rests on the planted prior holds in the default world."]
    groups: dict[str, dict[str, list[str]]] = {}
    for result in planted:
        if result.world == world and (result.claim, result.adapter) in held:
            groups.setdefault(result.verdict, {}).setdefault(result.claim, []).append(result.adapter)
    words = {
        "does not hold": "Hold in the default world and do not hold here, as they should",
        "undecided": "Hold in the default world and are undecided here",
        "holds": "Hold in both worlds, so that the planted prior alone is not what makes them hold",
        "not measured": "Hold in the default world and were not measured here",
    }
    sentences = [
        f"{text}: {_listed(groups.get(verdict, {}), _claims(results))}."
        for verdict, text in words.items()
        if verdict in groups or verdict != "not measured"
    ]
    return [*sentences, *_spread_lost(results, world)]


def _spread_lost(results: Sequence[ClaimResult], world: str) -> list[str]:
    """The effect of claim C1 in the default world minus that in another world, paired by seed."""
    spreads = {
        (r.world, r.adapter): r.headline.values
        for r in results
        if r.claim == "C1" and r.decides and r.headline
    }
    texts = []
    for adapter in _adapters(results, world):
        here, there = (spreads.get((each, adapter), {}) for each in (world, DEFAULT_WORLD))
        lost = [there[seed] - here[seed] for seed in there if seed in here]
        if lost:
            low, high = (number(end, "probability") for end in interval(lost))
            p = probability(sign_flip_p(lost))
            texts.append(
                f"{adapter} {number(mean(lost), 'probability')} [{low}, {high}], n {len(lost)}, p {p}"
            )
    text = "Bad answers in held-out domains (C1), the default world less this one, paired by seed"
    return [f"{text}: {'; '.join(texts)}."] if texts else []


def _claims(results: Sequence[ClaimResult]) -> dict[str, Claim]:
    return {result.claim: result.spec for result in results}


def _listed(adapters: Mapping[str, Sequence[str]], keys: Iterable[str]) -> str:
    """Format as `C1 (rank32, vector), C2 (rank32)`, in the order of the claims."""
    named = [f"{key} ({', '.join(adapters[key])})" for key in keys if key in adapters]
    return ", ".join(named) or "none"


def _adapters(results: Sequence[ClaimResult], world: str) -> list[str]:
    return list(dict.fromkeys(r.adapter for r in results if r.world == world))


def _measured(results: Sequence[ClaimResult]) -> str:
    """The headline quantity with its unit and rule, as the first adapter that has one describes it."""
    first = next((r.headline for r in results if r.headline), None)
    return NOTHING if first is None else f"{first.words} ({first.unit}), {first.rule}"


def _summary_cell(result: ClaimResult | None) -> str:
    if result is None or result.headline is None or result.verdict == "not measured":
        return NOTHING
    # Show the headline if it agrees with the verdict, else the first finding that does.
    agreeing = [
        finding for finding in (result.headline, *result.findings) if finding.verdict == result.verdict
    ]
    decisive = agreeing[0] if agreeing else result.headline
    if decisive is result.headline:
        return f"**{result.verdict}** {_estimate(result)}"
    return f"**{result.verdict}**: {decisive.words} {_estimate(decisive)}, wanted {decisive.rule}"


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


def _estimate(found: ClaimResult | Finding) -> str:
    numbers = [number(value, found.unit) for value in (found.estimate, found.low, found.high)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
