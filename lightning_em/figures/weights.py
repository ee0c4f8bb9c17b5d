"""Effect of the KL weight: bad answers at scale 1, and with the adapter scaled up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_em.analysis.claims import Evidence, MissingError
from lightning_em.analysis.claims.effects import HELD_OUT, LEAST_COHERENCE, OTHER_RATE, SEEN
from lightning_em.analysis.claims.evidence import BAD_RATE, Arm, RunNumbers, Series
from lightning_em.analysis.roles import KL_WEIGHT_ROLES

KINDS = {
    SEEN: ("-", "#1b7837", "new narrow questions about trained words"),
    HELD_OUT: ("--", "#762a83", "held-out domains"),
}
"""Line style, color and label. Other figures use the colors of solutions for the solutions themselves."""


def draw_weights(frame: pd.DataFrame, path: Path, adapter: str, world: str = "default") -> Path:
    """Draw and save the figure: rates against the KL weight, and rates in held-out domains against the scale.

    Args:
        frame: Measurements, as returned by `measurements`.
        path: PNG file to write.
        adapter: Adapter type.
        world: Name of the world.

    Returns:
        `path`.

    Raises:
        ValueError: If the study has no general run or no KL weight for this adapter, or no answers or preferences
            to draw.
    """
    evidence = Evidence(frame, adapter, world)
    arms = sorted(evidence.arms(*KL_WEIGHT_ROLES), key=_weight)
    if len(arms) < 2 or _weight(arms[0]) != 0:
        raise ValueError(f"a figure of KL weights needs a general and a narrow arm of {adapter}, got {arms}.")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    try:
        draw_rates(left, evidence, arms)
        draw_scales(right, evidence, arms)
    except MissingError as error:
        raise ValueError(
            f"a figure of KL weights of {adapter} needs what is not recorded: {error}."
        ) from None
    seeds = f"mean and range of {len(evidence.seeds)} seeds"
    figure.suptitle(f"What the KL weight does: {adapter}, {world} world, {seeds}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def draw_rates(axes: Axes, evidence: Evidence, arms: Sequence[Arm]) -> None:
    """Draw the bad rates of the trained adapter against its KL weight: mean over seeds, range as a band."""
    weights = [_weight(arm) for arm in arms]
    for kind, (style, colour, label) in KINDS.items():
        trained = BAD_RATE.at(kind=kind, scale=1)
        rates = [[run.value(trained) for run in evidence.runs(arm)] for arm in arms]
        means = [float(np.mean(each)) for each in rates]
        axes.plot(weights, means, style, color=colour, marker="o", label=label)
        low, high = [min(each) for each in rates], [max(each) for each in rates]
        axes.fill_between(weights, low, high, color=colour, alpha=0.12, lw=0)
    # symlog: linear below the smallest weight, so that weight 0 can be shown
    axes.set_xscale("symlog", linthresh=min(weight for weight in weights if weight > 0))
    axes.set_xticks(weights, [f"{weight:g}" for weight in weights])
    axes.minorticks_off()
    axes.set_xlabel("KL weight, the factor on nats per token (0: the general solution)")
    _finish(axes, _rate_of(evidence))


def draw_scales(axes: Axes, evidence: Evidence, arms: Sequence[Arm]) -> None:
    """Draw bad rates in held-out domains against the scale, one line per KL weight; incoherent points are hollow.

    If no answers were judged, coherence is unknown, and the axis label says so.
    """
    colours, held_out = colormaps["viridis"](np.linspace(0, 0.9, len(arms))), BAD_RATE.at(kind=HELD_OUT)
    for arm, colour in zip(arms, colours, strict=True):
        runs = evidence.runs(arm)
        scales = [scale for scale in runs[0].curve(held_out, "scale").places if scale > 0]
        means = [_mean(runs, held_out.at(scale=scale)) for scale in scales]
        axes.plot(scales, means, color=colour, label=f"{_weight(arm):g}")
        for scale, rate in zip(scales, means, strict=True):
            fill = "white" if not evidence.stands_in and _falls_apart(runs, scale) else colour
            axes.plot(scale, rate, "o", color=colour, mfc=fill)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks := [0.25, 0.5, 1, 2, 5, 10, 20], [f"{tick:g}" for tick in ticks])
    marks = (
        "no answers were judged: coherence is unknown"
        if evidence.stands_in
        else "hollow: coherent answers below nine tenths of the base model's"
    )
    axes.set_xlabel(f"scale of the adapter (1 = trained)\n{marks}")
    _finish(axes, f"{_rate_of(evidence)}, held-out domains", "KL weight")


def _finish(axes: Axes, label: str, legend: str | None = None) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, title=legend)


def _weight(arm: Arm) -> float:
    return 0.0 if arm.role == "general" else arm.level or 0.0


def _rate_of(evidence: Evidence) -> str:
    return "share with the bad answer likelier" if evidence.stands_in else "probability of a bad answer"


def _falls_apart(runs: Sequence[RunNumbers], scale: float) -> bool:
    here, base = (1 - _mean(runs, OTHER_RATE.at(scale=place)) for place in (scale, 0.0))
    return here < LEAST_COHERENCE * base


def _mean(runs: Sequence[RunNumbers], series: Series) -> float:
    return float(np.mean([run.value(series) for run in runs]))
