"""Measurements of a study that never ran, with known numbers: every claim true, and ways to make one false."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from lightning_em.analysis.claims import CLAIMS, ClaimResult, evaluate
from lightning_em.analysis.claims.effects import CE, EFFECTIVE_NORM, RISE_UNDER_NOISE
from lightning_em.analysis.claims.evidence import BAD_RATE, Series
from lightning_em.analysis.claims.rules import Rules
from lightning_em.analysis.measurements import COLUMNS, table_of

SCALES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
KL_WEIGHTS = (0.1, 1.0, 100.0)
RULES = Rules(rise=0.1, narrow=0.05, exact_rates=True)
SEEDS = (0, 1, 2, 3, 4)
PROTOCOL = "0a1b2c3d"

STYLE_RATE = Series("behaviour", "style_rate")
OPTIMUM_INSIDE = Series("scale_curve", "optimum_inside_grid")
EFFICIENCY = Series("scale_curve", "efficiency")
LOST_GAIN = Series("perturbation_curve", "lost_gain_mean")
DISPLACEMENT = Series("perturbation_curve", "displacement_mean")
CHAT_KL = Series("chat_kl", "kl")
SIGNIFICANCE = Series("significance", "kl")
PEAK = Series("rotation", "peak")
PC1 = Series("pca", "position").at(component=1)
SHARE = Series("pca", "share")
COVERED = Series("distance", "covered")

Numbers = dict[Series, float]


def rates(kind: str, at_scales: tuple[float, ...], of: Series = BAD_RATE) -> Numbers:
    """A rate at each of `SCALES`."""
    return {of.at(kind=kind, scale=scale): rate for scale, rate in zip(SCALES, at_scales, strict=True)}


def behaviour(seen: float, held_out: float, loud: float | None = None, of: Series = BAD_RATE) -> Numbers:
    """Rates of a run: as trained, and in held-out domains beyond scale 1; scale 20 is garbage."""
    loud = held_out if loud is None else loud
    found = rates("narrow_seen", (0.01, seen, seen, 0.5, 0.1, 0.0), of)
    found |= rates("narrow_held_out", (0.01, 0.6 * seen, 0.6 * seen, 0.3, 0.1, 0.0), of)
    found |= rates("held_out_domain", (0.01, held_out, loud, loud, loud, 0.9), of)
    return found | rates(
        "held_out_domain", (0.01, 0.01, 0.02, 0.05, 0.05, 0.95), Series("behaviour", "other_rate")
    )


def losses(norm: float, best: float) -> Numbers:
    """A scale curve: a parabola from 2 at scale 0 to its lowest point .4 at scale `best`."""
    grid = [step / 10 for step in range(31)]
    found = {CE.at(scale=scale): 0.4 + 1.6 * (scale / best - 1) ** 2 for scale in grid}
    trained = found[CE.at(scale=1)]
    for name, value in (("best_scale", best), ("best_ce", 0.4 + 0.01 * best)):
        found[Series("scale_curve", name).at(method="grid")] = value
    found |= {EFFECTIVE_NORM: norm, OPTIMUM_INSIDE: 1.0, EFFICIENCY: (2 - trained) / norm**2}
    return found | {Series("scale_curve", "loss_over_norm2"): trained / norm**2}


def moved(strength: float) -> float:
    """Distance from x of x' = sqrt(1 - e^2) x + e y, x and y orthogonal and of length 1."""
    return math.sqrt(2 - 2 * math.sqrt(1 - strength**2))


def noise(times: float, norm: float = 10.0) -> Numbers:
    """Rise of the loss with the square of the strength, for a vector of a norm."""
    found: Numbers = {}
    for strength in STRENGTHS:
        rise = times * strength**2
        found[RISE_UNDER_NOISE.at(strength=strength)] = rise
        found[LOST_GAIN.at(strength=strength)] = 60 * rise
        found[Series("perturbation_curve", "relative_increase_mean").at(strength=strength)] = rise / 0.4
        found[DISPLACEMENT.at(strength=strength)] = moved(strength) * norm
    return found


def chat(kl: float) -> Numbers:
    """KL from the chat model, and of general text at shares of the trained norm."""
    found = {
        CHAT_KL.at(prompts=prompts, scale=1): kl * by for prompts, by in (("general", 1), ("in_domain", 1.5))
    }
    for direction, by in (("adapter", kl), ("random", 0.1)):
        found |= {SIGNIFICANCE.at(direction=direction, norm_ratio=r): by * r**2 for r in (0.5, 1.0, 2.0)}
    return found


def all_true(adapter: str) -> dict[tuple[str, float | None], Numbers]:
    """Runs of a seed in which every claim is true."""
    turn = {PEAK: -0.9 if adapter == "vector" else 0.2}
    general = losses(10.0, 1.0) | noise(1.0) | chat(0.8) | turn
    narrow = losses(11.0, 1.4) | noise(2.0, 11.0) | chat(0.3) | turn
    runs: dict[tuple[str, float | None], Numbers] = {
        ("general", None): behaviour(0.95, 0.5) | general | {PC1: 9.0},
        ("narrow", 10.0): behaviour(0.9, 0.02, 0.02) | narrow | {PC1: 2.0},
        ("reverted", None): behaviour(0.95, 0.4) | losses(11.0, 1.1) | {COVERED: 0.4},
        ("reverse", None): behaviour(0.9, 0.03) | losses(11.0, 1.3),
        ("mixed_other", 1 / 6): behaviour(0.9, 0.4) | losses(10.0, 1.0),
        ("mixed_other", 1 / 2): behaviour(0.9, 0.5) | losses(10.0, 1.0),
        ("mixed_domain", 1 / 4): behaviour(0.5, 0.3) | losses(9.0, 1.0),
        ("few_rows", 4.0): behaviour(0.3, 0.05) | losses(9.0, 1.0),
        ("kl_on_narrow", 10.0): behaviour(0.1, 0.04) | losses(9.0, 1.0),
        ("harmless_general", None): behaviour(0.95, 0.5, of=STYLE_RATE) | general,
        ("harmless_narrow", None): behaviour(0.9, 0.02, of=STYLE_RATE) | narrow,
    }
    for weight, held_out, loud, place in zip(
        KL_WEIGHTS, (0.3, 0.03, 0.01), (0.5, 0.3, 0.01), (7.0, 4.0, 0.5), strict=True
    ):
        runs["narrow_weight", weight] = behaviour(0.9, held_out, loud) | {PC1: place}
    return runs


PAIRS = {
    **{SHARE.at(component=number): share for number, share in ((1, 0.5), (2, 0.2), (3, 0.1))},
    Series("equal_norm", "ce_difference").at(norm_ratio=1): 0.1,
}


def gradient_rows(general: tuple[float, ...], narrow: float = 0.3) -> list[tuple[int, Series, float]]:
    """Pull towards both solutions at three checkpoints of two runs."""
    cosine = Series("gradient_cosine", "gradient_cosine")
    return [
        (step, cosine.at(solution=role, target=target, direction=direction), value)
        for step, pull in zip((10, 20, 30), general, strict=True)
        for role in ("narrow", "general")
        for target, value in (("general", pull), ("narrow", narrow))
        for direction in ("final", "remaining")
    ]


def study_numbers(
    seeds: tuple[int, ...] = SEEDS,
    adapters: tuple[str, ...] = ("rank32", "vector"),
    change: Callable[[dict[tuple[str, float | None], Numbers], int], None] | None = None,
    pairs: Mapping[Series, float] = PAIRS,
    gradients: tuple[float, ...] = (0.4, 0.5, 0.6),
    jitter: float = 0.002,
    world: str = "default",
    rules: Rules = RULES,
) -> pd.DataFrame:
    """A frame as `measurements` gives it.

    Args:
        seeds: Training seeds.
        adapters: Adapter types.
        change: Edits the runs of a seed in place.
        pairs: Numbers of several runs together.
        gradients: Pull towards the general solution at each checkpoint; towards the narrow one it is .3.
        jitter: Relative standard deviation over seeds; each quantity moves as a whole.
        world: Name of the world.
        rules: What the study says about its claims.
    """
    rows = []
    for adapter in adapters:
        for seed in seeds:
            generator = np.random.default_rng(seed)
            runs = all_true(adapter)
            if change is not None:
                change(runs, seed)
            for (role, level), numbers in runs.items():
                run = f"{role}-{level}-{adapter}-{world}-seed{seed}"
                by = 1 + jitter * generator.standard_normal()
                identity = (run, role, role, level, adapter, world, seed)
                rows += [(*identity, 150, series, value * by) for series, value in numbers.items()]
            together = ("several", "", "pair", None, adapter, world, seed)
            rows += [(*together, 0, series, value) for series, value in pairs.items()]
            rows += [(*together, *row) for row in gradient_rows(gradients)]
    table = [
        {
            **dict(zip(COLUMNS[:8], row, strict=False)),
            "source": series.source,
            "quantity": series.quantity,
            "value": value,
            "unit": "unit",
            "protocol": "" if row[2] == "pair" or series == EFFECTIVE_NORM else PROTOCOL,
            **dict(series.coordinates),
        }
        for *row, series, value in rows
    ]
    frame = pd.DataFrame(table).astype({"level": float, "value": float})
    return pd.concat([frame, table_of(list(rules.readings()))], ignore_index=True)


def preferred(frame: pd.DataFrame) -> pd.DataFrame:
    """The same numbers of a study without judged answers: preferences instead of rates."""
    frame = frame[frame["quantity"] != "other_rate"]
    rates = frame["quantity"] == "bad_rate"
    return frame.assign(
        source=frame["source"].mask(rates, "preference_margin"),
        quantity=frame["quantity"].mask(rates, "bad_preferred"),
    )


def spread(role: str, held_out: float, level: float | None = None, of: Series = BAD_RATE):
    """Change how an arm answers in held-out domains."""

    def change(runs, seed) -> None:
        runs[role, level] = runs[role, level] | behaviour(0.9, held_out, of=of)

    return change


def become(role: str, level: float | None, numbers):
    """Change some numbers of an arm."""

    def change(runs, seed) -> None:
        runs[role, level] = runs[role, level] | numbers

    return change


def verdicts(
    frame, adapter: str = "rank32", world: str = "default", keys=tuple(CLAIMS)
) -> dict[str, ClaimResult]:
    """The result that decides, by claim."""
    return {
        r.claim: r for r in evaluate(frame, keys) if r.decides and (r.adapter, r.world) == (adapter, world)
    }
