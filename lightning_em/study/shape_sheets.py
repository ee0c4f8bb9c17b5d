"""Tables of the arms next to the published results: rates, scales, norms and principal components."""

import itertools
import math

import pandas as pd

from lightning_em.analysis.claims import Evidence, MissingError
from lightning_em.analysis.claims.effects import HELD_OUT
from lightning_em.analysis.claims.evidence import Arm, RunNumbers
from lightning_em.analysis.roles import KL_WEIGHT_ROLES, role_named
from lightning_em.study.sheet import NOTHING, Sheet, mean, number

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


def arms_sheet(frame: pd.DataFrame, world: str) -> Sheet:
    """Table of bad-answer rates, losses and norm of each arm: means over seeds."""
    rows = []
    for e in _evidence(frame, world):
        for arm in _arms(e):
            rates = [_mean(e, arm, f"{_rate(arm)}/{kind}@1") for kind in KINDS]
            losses = [_mean(e, arm, quantity) for quantity in ("val/ce", "val/kl", "effective_norm")]
            runs = _runs(e, arm)
            rows.append((
                f"{arm}, {e.adapter}", str(len(runs)), *(number(rate, "probability") for rate in rates),
                number(losses[0]), number(losses[1]), number(losses[2]),
            ))  # fmt: skip
    columns = ("arm", "n", *KINDS.values(), "CE, nats/token", "KL, nats/token", "effective norm")
    caption = (
        "Probability of a bad answer by kind of question (of an answer in the trained style for the harmless arms), "
        "losses on held-out rows; means over seeds. Narrow questions are new ones, about words that rows of the "
        "fine-tuning had, or about words that none of them had."
    )
    return Sheet(f"What the arms do, {world} world", columns, tuple(rows), caption, is_detail=True)


def scales_sheet(frame: pd.DataFrame, world: str) -> Sheet:
    """Table of bad-answer rates and coherence in held-out domains with the adapter scaled up, by KL weight."""
    arms = [(e, arm) for e in _evidence(frame, world) for arm in e.arms(*KL_WEIGHT_ROLES)]
    scales = sorted({scale for e, arm in arms for run in _runs(e, arm) for scale in _scales(run)})
    rows = []
    for e, arm in arms:
        cells = []
        for scale in scales:
            bad = _mean(e, arm, f"bad_rate/{HELD_OUT}@{scale:g}")
            coherence = 1 - _mean(e, arm, f"other_rate/{HELD_OUT}@{scale:g}")
            known = not math.isnan(bad)
            cells.append(f"{number(bad, 'share')} ({number(coherence, 'share')})" if known else NOTHING)
        rows.append((f"{arm}, {e.adapter}", *cells))
    caption = (
        "Probability of a bad answer in held-out domains with the adapter's effect scaled up; in brackets the share of "
        "coherent answers, good or bad. Means over seeds."
    )
    columns = ("arm", *(f"scale {scale:g}" for scale in scales))
    return Sheet(f"Suppressed or absent, {world} world", columns, tuple(rows), caption, is_detail=True)


def norms_sheet(frame: pd.DataFrame, world: str) -> Sheet:
    """Table of the effective norm by KL weight and checkpoint, and of the seeds in which it falls with the weight."""
    rows, steps = [], _steps(frame, world)
    for e in _evidence(frame, world):
        rows += _ways(e, "effective_norm", steps, e.adapter)
    caption = f"Effective norm, mean over seeds, at each checkpoint. {PUBLISHED_NORMS}"
    columns = ("KL weight", *(f"step {step}" for step in steps))
    return Sheet(f"Norms on the way, {world} world", columns, tuple(rows), caption, is_detail=True)


def places_sheet(frame: pd.DataFrame, world: str) -> Sheet:
    """Table of the coordinate on each component by KL weight and checkpoint.

    It also counts the seeds in which the coordinate falls with the weight.
    """
    rows, steps = [], _steps(frame, world)
    for e in _evidence(frame, world):
        for component in (1, 2, 3):
            rows += _ways(e, f"pca/pc{component}", steps, f"{e.adapter}, PC{component}")
    caption = (
        "Place of each checkpoint on the principal components of all checkpoints of all KL weights, standardised; mean "
        f"over seeds, the run without KL ending on the positive side. {PUBLISHED_PLACES}"
    )
    columns = ("KL weight", *(f"step {step}" for step in steps))
    return Sheet(f"Components on the way, {world} world", columns, tuple(rows), caption, is_detail=True)


def _ways(e: Evidence, quantity: str, steps: list[int], title: str) -> list[tuple[str, ...]]:
    """One row per KL weight with the mean over seeds at each step, and a row that counts the seeds in order."""
    arms = sorted(e.arms(*KL_WEIGHT_ROLES), key=lambda arm: arm.level or 0.0)
    rows = []
    for arm in arms:
        paths = [_path(run, quantity) for run in _runs(e, arm)]
        cells = [number(mean([path.get(step, math.nan) for path in paths])) for step in steps]
        rows.append((f"{title}, KL weight {arm.level or 0:g}", *cells))
    falling = (_falling(e, arms, quantity, step) for step in steps)
    return [*rows, (f"{title}: falls with the weight", *falling)]


def components_sheet(frame: pd.DataFrame) -> Sheet:
    """Table of the shares of variance on the first principal components, next to the published ones."""
    rows = [
        ("published", "-", *(f"{share:.1%}" for share in PUBLISHED_SHARES), f"{sum(PUBLISHED_SHARES):.0%}")
    ]
    for world in dict.fromkeys(frame["world"]):
        for e in _evidence(frame, world):
            found = [shares for seed in e.seeds if (shares := _shares(e, seed))]
            if found:
                means = [mean(column) for column in zip(*found, strict=True)]
                cells = (*(f"{share:.1%}" for share in means), f"{sum(means):.0%}")
                rows.append((f"{e.adapter}, {world} world", str(len(found)), *cells))
    caption = (
        "Share of the variance of all checkpoints of all KL weights on each principal component, standardised, mean "
        "over seeds. To be compared is that a few components hold most of it, not the shares."
    )
    return Sheet(
        "Components of the trajectories", ("", "n", "PC1", "PC2", "PC3", "sum"), tuple(rows), caption
    )


def _evidence(frame: pd.DataFrame, world: str) -> list[Evidence]:
    own = frame[frame["world"] == world]
    return [Evidence(own, adapter, world) for adapter in dict.fromkeys(own["adapter"])]


def _arms(e: Evidence) -> list[Arm]:
    roles = dict.fromkeys((*KL_WEIGHT_ROLES, "reverted", "reverse", *(arm.role for arm in e.arms())))
    return [arm for role in roles for arm in e.arms(role)]


def _runs(e: Evidence, arm: Arm) -> list[RunNumbers]:
    return [e.run(arm, seed) for seed in e.seeds_of(arm)]


def _mean(e: Evidence, arm: Arm, quantity: str) -> float:
    return mean([_value(run, quantity) for run in _runs(e, arm)])


def _value(run: RunNumbers, quantity: str) -> float:
    try:
        return run.value(quantity)
    except MissingError:
        return math.nan


def _path(run: RunNumbers, quantity: str) -> dict[int, float]:
    try:
        return dict(run.by_step(quantity))
    except MissingError:
        return {}


def _rate(arm: Arm) -> str:
    return role_named(arm.role).rate


def _scales(run: RunNumbers) -> tuple[float, ...]:
    try:
        return run.curve(f"bad_rate/{HELD_OUT}").places
    except MissingError:
        return ()


def _steps(frame: pd.DataFrame, world: str) -> list[int]:
    """Steps of the general run's checkpoints, evenly thinned to `MOST_STEPS`."""
    own = frame[(frame["world"] == world) & (frame["role"] == "general")]
    steps = sorted({int(step) for step in own["step"][own["quantity"] == "effective_norm"]})
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def _falling(e: Evidence, arms: list[Arm], quantity: str, step: int) -> str:
    """Count the seeds in which the quantity falls as the KL weight rises.

    Only the weights that a seed was run with are compared: not every arm has every seed.
    """
    falling, count = 0, 0
    for seed in e.seeds:
        runs = [e.run(arm, seed) for arm in arms if seed in e.seeds_of(arm)]
        values = [_path(run, quantity).get(step, math.nan) for run in runs]
        if len(values) > 1 and not any(map(math.isnan, values)):
            count += 1
            falling += all(after < before for before, after in itertools.pairwise(values))
    return f"{falling} of {count} seeds" if count else NOTHING


def _shares(e: Evidence, seed: int) -> list[float]:
    try:
        return [e.pair(seed).value(f"pca/share_{number}") for number in (1, 2, 3)]
    except MissingError:
        return []
