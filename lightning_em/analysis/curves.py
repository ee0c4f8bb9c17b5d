"""Curves of training loss against scale or effective norm, and comparisons of two curves."""

import fnmatch
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossCurve:
    """Cross-entropy on training rows with the update multiplied by `scale`, nats per token.

    Attributes:
        scales: Scales in ascending order from 0, the base model; 1 is the trained adapter.
        ce: Loss at each scale.
        effective_norm: Effective norm of the trained adapter.
        step: Optimizer steps taken.
    """

    scales: tuple[float, ...]
    ce: tuple[float, ...]
    effective_norm: float
    step: int

    @property
    def norms(self) -> tuple[float, ...]:
        """Effective norm at each scale."""
        return tuple(scale * self.effective_norm for scale in self.scales)

    @property
    def base_ce(self) -> float:
        """Loss of the base model."""
        return self.ce[0]

    @property
    def trained_ce(self) -> float:
        """Loss of the trained adapter, at scale 1."""
        return self.ce[self.scales.index(1.0)]

    @property
    def best_scale(self) -> float:
        """Scale on the grid with the lowest loss."""
        return self.scales[int(np.argmin(self.ce))]

    @property
    def best_ce(self) -> float:
        """Lowest loss on the grid."""
        return min(self.ce)

    @property
    def efficiency(self) -> float:
        """(L_base - L) / norm^2 of the trained adapter, L being its loss."""
        return (self.base_ce - self.trained_ce) / self.effective_norm**2

    def ce_at_norm(self, norm: float) -> float:
        """Return the loss with the adapter scaled to an effective norm, interpolated linearly.

        Raises:
            ValueError: If `norm` is outside the measured range.
        """
        if not 0 <= norm <= self.norms[-1]:
            raise ValueError(
                f"the curve was measured at norms 0 to {self.norms[-1]:.4g}, not at {norm:.4g}; "
                "probe more scales."
            )
        return float(np.interp(norm, self.norms, self.ce))


class EqualNorm(NamedTuple):
    """Losses of two solutions, scaled to the smaller of their trained effective norms; nats per token."""

    norm: float
    general_ce: float
    narrow_ce: float


def loss_curve(records: pd.DataFrame, step: int | None = None) -> LossCurve:
    """Read the scale curve of a run.

    Args:
        records: Table from `records_frame`.
        step: Step of the checkpoint. Defaults to the last one with a scale curve.

    Raises:
        ValueError: If there is no scale curve, or the adapter has no effective norm.
    """
    curves = records[records["probe"] == "scale_curve"]
    steps = sorted(map(int, curves["step"].unique()))
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" at step {step}"
        raise ValueError(f"there is no scale curve{wanted}; steps with one: {steps}.")
    step = steps[-1] if step is None else step
    curves = curves[curves["step"] == step]
    curves = curves[curves["measurement"] == curves["measurement"].max()]
    norm = curves[curves["quantity"] == "effective_norm"]["value"]
    if norm.empty:
        raise ValueError("the adapter has no effective norm, so its loss cannot be drawn against one.")
    losses = curves[(curves["quantity"] == "ce") & (curves["scale"] >= 0)].sort_values("scale")
    return LossCurve(
        tuple(map(float, losses["scale"])), tuple(map(float, losses["value"])), float(norm.iloc[0]), step
    )


def at_equal_norm(general: LossCurve, narrow: LossCurve) -> EqualNorm:
    """Compare two solutions of one adapter type at the smaller of their trained norms."""
    norm = min(general.effective_norm, narrow.effective_norm)
    return EqualNorm(norm, general.ce_at_norm(norm), narrow.ce_at_norm(norm))


def common_grid(
    curves: Sequence[LossCurve], against: str, num_points: int = 101
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate the curves of several seeds linearly on a common axis, up to the end of the shortest curve.

    Args:
        curves: One curve per seed.
        against: Quantity on the axis, `effective_norm` or `scale`.
        num_points: Number of points on the axis.

    Returns:
        The axis `[points]` and the losses `[seeds points]`.
    """
    axes = [curve.norms if against == "effective_norm" else curve.scales for curve in curves]
    grid = np.linspace(0, min(axis[-1] for axis in axes), num_points)
    return grid, np.stack([np.interp(grid, axis, curve.ce) for axis, curve in zip(axes, curves, strict=True)])


def sign_test(num_agreeing: int, num_pairs: int) -> float:
    """Compute the one-sided p-value of the sign test; a tie counts as a disagreement.

    It is the probability of at least `num_agreeing` agreeing pairs if both signs are equally likely. Five seeds
    that all agree give 1/32 = .031, the smallest p-value for five seeds.
    """
    return (
        sum(math.comb(num_pairs, agreeing) for agreeing in range(num_agreeing, num_pairs + 1))
        / 2.0**num_pairs
    )


def runs_by_base(root: str | Path, experiment: str, base: str = "*") -> Mapping[str, RunFolder]:
    """Return the newest finished run of an experiment for each base model; older runs are skipped with a warning.

    Args:
        root: Folder of the runs.
        experiment: Name of the runs, without the trailing hash.
        base: Pattern of `model.base.path`, such as `miniature://seed-*/model`.
    """
    found: dict[str, RunFolder] = {}
    folders = [RunFolder(file.parent) for file in Path(root).glob(f"{experiment}-*/run.json")]
    finished = [run for run in folders if run.read_run().get("status") == "finished"]
    for run in sorted(finished, key=lambda run: str(run.read_run().get("ended"))):
        config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
        path = config["model"]["base"]["path"]
        if not fnmatch.fnmatch(path, base):
            continue
        if path in found:
            logger.warning("%s: %s is ignored in favor of the newer %s", path, found[path].path, run.path)
        found[path] = run
    return dict(sorted(found.items()))
