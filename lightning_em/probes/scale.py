"""Loss as a function of the adapter's scale: the efficiency of a solution."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_em.batch import CountedPositions
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import EFFECTIVE_NORM, Probe, ProbeExamples, RowMeans
from lightning_em.records import Point, Quantity

logger = logging.getLogger(__name__)

_PER_SQUARED_NORM = "nats_per_token_per_squared_norm"

DEFAULT_SCALES = tuple(step / 10 for step in range(21))


class ScaleCurve(Probe):
    """Training-set loss with the update multiplied by `scale`.

    Cross-entropy is the mean over tokens, sum over all rows / count over all rows, as in training. `per_example`
    holds the mean of each row. Standard errors take rows as the unit.

    Points, in nats per token unless stated otherwise:
        `ce`: cross-entropy at each scale. Scale 0 is the base model and 1 the trained adapter; both are always
            measured.
        `ce_minus_base`: paired difference from the base model.
        `kl`: KL on the KL rows, if `with_kl` is set.
        `best_scale` (unit scale) and `best_ce`: `method: grid` is the smallest value on the grid;
            `method: parabola` is the vertex of the parabola through it and its two neighbors, omitted if the
            smallest value is at an edge of the grid.
        `optimum_inside_grid` (unit boolean): 0 if the smallest value is at an edge of the grid.
        `effective_norm` (unit norm): effective norm of the trained adapter; that at a scale is `scale` times as
            large. Omitted for adapters without a norm.
        `efficiency` = (L_base - L) / norm^2 and `loss_over_norm2` = L / norm^2 (unit
            nats_per_token_per_squared_norm): ratios for the trained adapter. The second is the paper's and
            rewards a larger norm. Omitted for adapters without a norm or with norm 0.
        `ce_tokens`, `kl_tokens` (unit tokens): counted tokens of each row.

    Args:
        scales: Grid of scales.
        extend_until_optimum: Continue beyond the last scale, with the grid's last spacing, until the loss rises.
        max_extension: Maximum number of scales to add.
        with_kl: Also measure the KL on the KL rows.
        kl_positions: Positions that count in the KL; set it as in training.

    Raises:
        ValueError: If `scales` is empty, or its values are not finite or not distinct.

    Source: arXiv:2602.07852 (efficiency).
    """

    name = "scale_curve"
    quantities = (
        Quantity("ce", "nats_per_token", ("scale",)),
        Quantity("ce_minus_base", "nats_per_token", ("scale",), in_study="none"),
        Quantity("kl", "nats_per_token", ("scale",)),
        Quantity("best_scale", "scale", ("method",)),
        Quantity("best_ce", "nats_per_token", ("method",)),
        Quantity("optimum_inside_grid", "boolean"),
        EFFECTIVE_NORM,
        Quantity("efficiency", _PER_SQUARED_NORM),
        Quantity("loss_over_norm2", _PER_SQUARED_NORM),
        Quantity("ce_tokens", "tokens", in_study="none"),
        Quantity("kl_tokens", "tokens", in_study="none"),
    )
    grid = ("scales", "max_extension")

    def __init__(
        self,
        scales: Sequence[float] = DEFAULT_SCALES,
        extend_until_optimum: bool = False,
        max_extension: int = 20,
        with_kl: bool = False,
        kl_positions: CountedPositions = "response",
    ) -> None:
        if not scales or len(set(scales)) != len(scales) or not all(map(math.isfinite, scales)):
            raise ValueError(
                f"scales must be different finite numbers, one or more, got {list(scales)}; "
                "set init_args.scales of ScaleCurve."
            )
        if max_extension < 0:
            raise ValueError(
                f"max_extension must be 0 or more, got {max_extension}; "
                "set init_args.max_extension of ScaleCurve."
            )
        self.scales = sorted({*map(float, scales), 0.0, 1.0})
        self.extend_until_optimum, self.max_extension = extend_until_optimum, max_extension
        self.with_kl, self.kl_positions = with_kl, kl_positions
        self.reads = ["narrow", "kl"] if with_kl else ["narrow"]

    def settings(self) -> Mapping[str, Any]:
        return {
            "scales": self.scales,
            "max_extension": self.max_extension if self.extend_until_optimum else 0,
            "kl_positions": self.kl_positions if self.with_kl else None,
        }

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        at_scale = model.adapter.at_scale
        states = [partial(at_scale, scale) for scale in self.scales]
        curve = dict(zip(self.scales, RowMeans.of_ce(model, examples.narrow, states), strict=True))
        if self.extend_until_optimum:
            self._extend(curve, model, examples)
        norm = model.adapter.effective_norm()
        points = [means.point("ce", {"scale": scale}) for scale, means in curve.items()]
        points += [(means - curve[0.0]).point("ce_minus_base", {"scale": s}) for s, means in curve.items()]
        points.append(curve[0.0].token_counts("ce_tokens"))
        points += _best({scale: row_means.mean for scale, row_means in curve.items()})
        if norm is None:
            rank_zero_only(logger.info)(
                "%s has no effective norm: points of %s carry none.", type(model.adapter).__name__, self.name
            )
        else:
            points.append(Point("effective_norm", norm.item(), "norm"))
            points += _efficiency(curve, norm.item())
        return points + self._kl(model, examples, list(curve))

    def _extend(self, curve: dict[float, RowMeans], model: AdaptedModel, examples: ProbeExamples) -> None:
        """Add scales to `curve` until its smallest value is not the last, or `max_extension` is reached."""
        last, spacing = self.scales[-1], self.scales[-1] - self.scales[-2]
        for step in range(1, self.max_extension + 1):
            if min(curve, key=lambda s: curve[s].mean) < max(curve):
                return
            scale = round(last + step * spacing, 10)
            [curve[scale]] = RowMeans.of_ce(model, examples.narrow, [partial(model.adapter.at_scale, scale)])

    def _kl(self, model: AdaptedModel, examples: ProbeExamples, scales: Sequence[float]) -> list[Point]:
        if not self.with_kl:
            return []
        if not examples.kl:
            rank_zero_only(logger.info)("there are no parallel rows: %s measures no KL.", self.name)
            return []
        states = [partial(model.adapter.at_scale, scale) for scale in scales]
        curve = RowMeans.of_kl(model, examples.kl, states, self.kl_positions)
        points = [means.point("kl", {"scale": scale}) for means, scale in zip(curve, scales, strict=True)]
        return [*points, curve[0].token_counts("kl_tokens")]


def _efficiency(curve: dict[float, RowMeans], norm: float) -> list[Point]:
    """(L_base - L) / norm^2 and L / norm^2 of the trained adapter."""
    if norm == 0:
        return []
    trained = curve[1.0]
    points = []
    for quantity, means in {"efficiency": curve[0.0] - trained, "loss_over_norm2": trained}.items():
        error = None if means.standard_error is None else means.standard_error / norm**2
        count = int(means.counts.sum())
        points.append(Point(quantity, means.mean / norm**2, _PER_SQUARED_NORM, {}, error, count))
    return points


def _best(values: dict[float, float]) -> list[Point]:
    """The minimum of a curve, on its grid and between grid points."""
    scales = sorted(values)
    index = min(range(len(scales)), key=lambda i: values[scales[i]])
    inside = 0 < index < len(scales) - 1
    best = {"grid": (scales[index], values[scales[index]])}
    if inside:
        best["parabola"] = _vertex([(s, values[s]) for s in scales[index - 1 : index + 2]])
    points = [Point("optimum_inside_grid", float(inside), "boolean")]
    for method, (scale, value) in best.items():
        points.append(Point("best_scale", scale, "scale", {"method": method}))
        points.append(Point("best_ce", value, "nats_per_token", {"method": method}))
    return points


def _vertex(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Vertex of the parabola through three points, of which the middle one is the lowest."""
    # Newton's divided differences, because the grid may be unevenly spaced:
    # the parabola is y1 + slope (x - x1) + curvature (x - x1)^2
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    if curvature <= 0:  # three equal values: the parabola is flat
        return x1, y1
    slope = left + curvature * (x1 - x0)
    return x1 - slope / (2 * curvature), y1 - slope**2 / (4 * curvature)
