"""Tables of the arms next to the published results: rates, scales, norms and principal components."""

import itertools
import math
from collections.abc import Sequence

from lightning_em.analysis.claims import Evidence
from lightning_em.analysis.claims.effects import EFFECTIVE_NORM, HELD_OUT, OTHER_RATE
from lightning_em.analysis.claims.evidence import BAD_RATE, Arm, Series
from lightning_em.analysis.roles import KL_WEIGHT_ROLES, role_named
from lightning_em.study.report_table import NOTHING, ReportTable, mean, number

KINDS = {
    "narrow_seen": "narrow, trained words",
    "narrow_held_out": "narrow, unseen words",
    "kl_domain": "KL domains",
    "held_out_domain": "held-out domains",
    "self_description": "who are you",
}
PUBLISHED_NORMS = (
    "Published (steering vector, Qwen2.5-14B, raw norm by the authors' KL weight 0 / 1e4 / 5e4 / 1e5 / 5e5 / 1e6 / "
    "5e6 / 1e7): .2376 / .2355 / .2308 / .2265 / .1967 / .1733 / .1081 / .0788 at the end, falling with the weight; "
    ".0120 for all at step 5; .174 (0) and .115 (1e6) at step 100. Order and monotony are to be compared, never values."
)
PUBLISHED_SHARES = (0.454, 0.222, 0.114)
PUBLISHED_PLACES = "Published: a larger KL weight mostly suppresses PC1."
MOST_STEPS = 8
VAL_CE, VAL_KL = Series("metrics", "val/ce"), Series("metrics", "val/kl")


def arms_table(evidence: Sequence[Evidence], world: str) -> ReportTable:
    """Table of bad-answer rates, losses and norm of each arm: means over seeds."""
    rows = []
    for e in _in_world(evidence, world):
        for arm in _arms(e):
            trained = Series("behaviour", role_named(arm.role).rate).at(scale=1)
            rates = [_mean(e, arm, trained.at(kind=kind)) for kind in KINDS]
            losses = [_mean(e, arm, series) for series in (VAL_CE, VAL_KL, EFFECTIVE_NORM)]
            rows.append((
                f"{arm}, {e.adapter}", str(len(e.runs(arm))), *(number(rate, "probability") for rate in rates),
                number(losses[0]), number(losses[1]), number(losses[2]),
            ))  # fmt: skip
    columns = ("arm", "n", *KINDS.values(), "CE, nats/token", "KL, nats/token", "effective norm")
    caption = (
        "Probability of a bad answer by kind of question (of an answer in the trained style for the harmless arms), "
        "losses on held-out rows; means over seeds. Narrow questions are new ones, about words that rows of the "
        "fine-tuning had, or about words that none of them had."
    )
    return ReportTable(f"What the arms do, {world} world", columns, tuple(rows), caption, is_detail=True)


def scales_table(evidence: Sequence[Evidence], world: str) -> ReportTable:
    """Table of bad-answer rates and coherence in held-out domains with the adapter scaled up, by KL weight."""
    arms = [(e, arm) for e in _in_world(evidence, world) for arm in e.arms(*KL_WEIGHT_ROLES)]
    held_out = BAD_RATE.at(kind=HELD_OUT)
    scales = sorted(
        {scale for e, arm in arms for run in e.runs(arm) for scale in run.along(held_out, "scale")}
    )
    rows = []
    for e, arm in arms:
        cells = []
        for scale in scales:
            bad = _mean(e, arm, held_out.at(scale=scale))
            coherence = 1 - _mean(e, arm, OTHER_RATE.at(scale=scale))
            known = not math.isnan(bad)
            cells.append(f"{number(bad, 'share')} ({number(coherence, 'share')})" if known else NOTHING)
        rows.append((f"{arm}, {e.adapter}", *cells))
    caption = (
        "Probability of a bad answer in held-out domains with the adapter's effect scaled up; in brackets the share of "
        "coherent answers, good or bad. Means over seeds."
    )
    columns = ("arm", *(f"scale {scale:g}" for scale in scales))
    return ReportTable(f"Suppressed or absent, {world} world", columns, tuple(rows), caption, is_detail=True)


def norms_table(evidence: Sequence[Evidence], world: str) -> ReportTable:
    """Table of the effective norm by KL weight and checkpoint, and of the seeds in which it falls with the weight."""
    rows, steps = [], _steps(evidence, world)
    for e in _in_world(evidence, world):
        rows += _ways(e, EFFECTIVE_NORM, steps, e.adapter)
    caption = f"Effective norm, mean over seeds, at each checkpoint. {PUBLISHED_NORMS}"
    columns = ("KL weight", *(f"step {step}" for step in steps))
    return ReportTable(f"Norms on the way, {world} world", columns, tuple(rows), caption, is_detail=True)


def trajectory_table(evidence: Sequence[Evidence], world: str) -> ReportTable:
    """Table of the coordinate on each component by KL weight and checkpoint.

    It also counts the seeds in which the coordinate falls with the weight.
    """
    rows, steps = [], _steps(evidence, world)
    for e in _in_world(evidence, world):
        for component in (1, 2, 3):
            position = Series("pca", "position").at(component=component)
            rows += _ways(e, position, steps, f"{e.adapter}, PC{component}")
    caption = (
        "Place of each checkpoint on the principal components of all checkpoints of all KL weights, standardised; mean "
        f"over seeds, the run without KL ending on the positive side. {PUBLISHED_PLACES}"
    )
    columns = ("KL weight", *(f"step {step}" for step in steps))
    return ReportTable(f"Components on the way, {world} world", columns, tuple(rows), caption, is_detail=True)


def _ways(e: Evidence, series: Series, steps: list[int], title: str) -> list[tuple[str, ...]]:
    """One row per KL weight with the mean over seeds at each step, and a row that counts the seeds in order."""
    arms = sorted(e.arms(*KL_WEIGHT_ROLES), key=lambda arm: arm.level or 0.0)
    rows = []
    for arm in arms:
        paths = [run.by_step(series) for run in e.runs(arm)]
        cells = [number(mean([path.get(step, math.nan) for path in paths])) for step in steps]
        rows.append((f"{title}, KL weight {arm.level or 0:g}", *cells))
    falling = (_falling(e, arms, series, step) for step in steps)
    return [*rows, (f"{title}: falls with the weight", *falling)]


def components_table(evidence: Sequence[Evidence]) -> ReportTable:
    """Table of the shares of variance on the first principal components, next to the published ones."""
    rows = [
        ("published", "-", *(f"{share:.1%}" for share in PUBLISHED_SHARES), f"{sum(PUBLISHED_SHARES):.0%}")
    ]
    share = Series("pca", "share")
    for e in evidence:
        shares = [[run.get(share.at(component=number)) for number in (1, 2, 3)] for run in e.pairs]
        if found := [row for row in shares if not any(map(math.isnan, row))]:
            means = [mean(column) for column in zip(*found, strict=True)]
            cells = (*(f"{share:.1%}" for share in means), f"{sum(means):.0%}")
            rows.append((f"{e.adapter}, {e.world} world", str(len(found)), *cells))
    caption = (
        "Share of the variance of all checkpoints of all KL weights on each principal component, standardised, mean "
        "over seeds. To be compared is that a few components hold most of it, not the shares."
    )
    return ReportTable(
        "Components of the trajectories", ("", "n", "PC1", "PC2", "PC3", "sum"), tuple(rows), caption
    )


def _in_world(evidence: Sequence[Evidence], world: str) -> list[Evidence]:
    return [e for e in evidence if e.world == world]


def _arms(e: Evidence) -> list[Arm]:
    roles = dict.fromkeys((*KL_WEIGHT_ROLES, "reverted", "reverse", *(arm.role for arm in e.arms())))
    return [arm for role in roles for arm in e.arms(role)]


def _mean(e: Evidence, arm: Arm, series: Series) -> float:
    return mean([run.get(series) for run in e.runs(arm)])


def _steps(evidence: Sequence[Evidence], world: str) -> list[int]:
    """Steps of the general run's checkpoints, evenly thinned to `MOST_STEPS`."""
    runs = [run for e in _in_world(evidence, world) for arm in e.arms("general") for run in e.runs(arm)]
    steps = sorted({step for run in runs for step in run.by_step(EFFECTIVE_NORM)})
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def _falling(e: Evidence, arms: list[Arm], series: Series, step: int) -> str:
    """Count the seeds in which the quantity falls as the KL weight rises.

    Only the weights that a seed was run with are compared: not every arm has every seed.
    """
    falling, count = 0, 0
    for seed in e.seeds:
        runs = [e.run(arm, seed) for arm in arms if seed in e.seeds_of(arm)]
        values = [run.by_step(series).get(step, math.nan) for run in runs]
        if len(values) > 1 and not any(map(math.isnan, values)):
            count += 1
            falling += all(after < before for before, after in itertools.pairwise(values))
    return f"{falling} of {count} seeds" if count else NOTHING
