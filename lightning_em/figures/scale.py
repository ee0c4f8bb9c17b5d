"""Training loss against the size of an adapter, for the general and the narrow solution."""

from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes

from lightning_em.analysis import LossCurve, common_grid
from lightning_em.figures.dial import COLOURS

_LABELS = {
    "effective_norm": "effective norm of the update",
    "scale": "scale (1 = the trained adapter)",
}


def draw_loss_curves(
    axes: Axes, curves: Mapping[str, Sequence[LossCurve]], against: Literal["effective_norm", "scale"]
) -> None:
    """Draw one line per solution: mean over seeds, range over seeds as a band, base model as a dashed line.

    For each seed, a circle marks the trained adapter and a star the lowest loss of the curve.

    Args:
        axes: Axes to draw on.
        curves: `general` and `narrow` -> one curve per seed.
        against: Quantity on the horizontal axis.
    """
    for solution, each in curves.items():
        colour = COLOURS[solution]
        grid, losses = common_grid(each, against)
        axes.plot(grid, losses.mean(axis=0), color=colour, label=solution)
        axes.fill_between(grid, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, lw=0)
        for curve in each:
            unit = curve.effective_norm if against == "effective_norm" else 1.0
            axes.plot(unit, curve.trained_ce, "o", color=colour, mfc="white")
            axes.plot(unit * curve.best_scale, curve.best_ce, "*", color=colour, ms=10)
    every = [curve.base_ce for each in curves.values() for curve in each]
    axes.axhline(sum(every) / len(every), color="0.4", ls="--", lw=1, label="base")
    axes.set_xlabel(_LABELS[against])
    axes.set_ylabel("training cross-entropy (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend()
