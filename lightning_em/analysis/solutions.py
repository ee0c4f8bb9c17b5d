"""One run at one checkpoint as a row of a table: behavior by kind of question, losses, norm, best scale."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_em.records import Point, ProbeResult, read_metrics, read_results
from lightning_em.runs import RunFolder

_Z = 1.96  # two-sided 95 %


class Estimate(NamedTuple):
    """A mean over items with its 95 % normal interval; items are the unit, and a rate is clipped to 0..1."""

    mean: float
    low: float
    high: float
    num_items: int

    @classmethod
    def of_rate(cls, point: Point) -> "Estimate":
        """Build the estimate from a point that holds the mean of a probability over items."""
        half = _Z * (point.standard_error or 0.0)
        return cls(point.value, max(0.0, point.value - half), min(1.0, point.value + half), point.count or 0)

    @classmethod
    def of_share(cls, point: Point) -> "Estimate":
        """Build the estimate from a point that holds a share of items, with a Wilson interval.

        Unlike the normal interval it is not empty at a share of 0 or 1. Clustered items count as the number of
        independent items that has the point's standard error.
        """
        share, count = point.value, point.count or 1
        independent = float(count)
        if point.standard_error and 0 < share < 1:
            independent = min(count, share * (1 - share) / point.standard_error**2)
        center = (share + _Z**2 / (2 * independent)) / (1 + _Z**2 / independent)
        half = _Z * (share * (1 - share) / independent + (_Z / (2 * independent)) ** 2) ** 0.5
        half /= 1 + _Z**2 / independent
        return cls(share, max(0.0, center - half), min(1.0, center + half), count)

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Solution:
    """The main numbers of one solution.

    Attributes:
        name: Display name.
        bad_rates: Probability of a bad answer by kind of question, mean over items.
        ce: Cross-entropy on held-out narrow data, nats per token.
        kl: KL from the reference on held-out KL data, nats per token.
        effective_norm: Effective norm of the trained adapter.
        best_scale: Scale with the lowest training loss on the scale curve.
        step: Optimizer steps taken.
    """

    name: str
    bad_rates: dict[str, Estimate] = field(default_factory=dict)
    ce: float | None = None
    kl: float | None = None
    effective_norm: float | None = None
    best_scale: float | None = None
    step: int | None = None


def solution_of(run: RunFolder, name: str, scale: float = 1.0) -> Solution:
    """Summarize the last recorded step of a run.

    Args:
        run: Run folder.
        name: Display name of the row.
        scale: Adapter scale of the behavior rates; losses are always those of scale 1.

    Raises:
        ValueError: If the run has no behavior record at this scale.
    """
    behaviour, curve = _last(run, "behaviour"), _last(run, "scale_curve")
    metrics = _last_metrics(run)
    norm = _first(curve, "effective_norm")
    best = [p for p in _points(curve, "best_scale") if p.coordinates.get("method") == "grid"]
    return Solution(
        name,
        _bad_rates(behaviour, scale, run),
        metrics.get("val/ce"),
        metrics.get("val/kl"),
        norm.value if norm else None,
        best[0].value if best else None,
        behaviour.step if behaviour else (curve.step if curve else None),
    )


def base_of(run: RunFolder, name: str = "base") -> Solution:
    """Summarize the base model from a run's own probes at scale 0."""
    curve = _last(run, "scale_curve")
    at_zero = [p for p in _points(curve, "ce") if p.coordinates.get("scale") == 0]
    ce = at_zero[0].value if at_zero else None
    return Solution(name, _bad_rates(_last(run, "behaviour"), 0.0, run), ce=ce, kl=0.0, effective_norm=0.0)


def median_solution(name: str, solutions: Sequence[Solution]) -> Solution:
    """Return the medians over seeds, with the range over seeds as the interval.

    Raises:
        ValueError: If `solutions` is empty.
    """
    if not solutions:
        raise ValueError(f"there is no run to take the median of for {name!r}.")
    rates = {}
    for kind in solutions[0].bad_rates:
        values = [s.bad_rates[kind].mean for s in solutions]
        rates[kind] = Estimate(statistics.median(values), min(values), max(values), len(values))
    return Solution(
        name,
        rates,
        _median(s.ce for s in solutions),
        _median(s.kl for s in solutions),
        _median(s.effective_norm for s in solutions),
        _median(s.best_scale for s in solutions),
        solutions[0].step,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _bad_rates(result: ProbeResult | None, scale: float, run: RunFolder) -> dict[str, Estimate]:
    if result is None:
        return {}
    points = [p for p in result.points if p.quantity == "bad_rate" and p.coordinates["scale"] == scale]
    if not points:
        known = sorted({float(p.coordinates["scale"]) for p in result.points if p.quantity == "bad_rate"})
        raise ValueError(f"{run.path} has no behaviour at scale {scale}; it was recorded at {known}.")
    return {str(p.coordinates["kind"]): Estimate.of_rate(p) for p in points}


def _last(run: RunFolder, probe: str) -> ProbeResult | None:
    """Return the newest record of the last step."""
    # `max` returns the first of equal steps, so the newest record comes first
    newest_first = reversed(read_results(run.probe_file(probe)))
    return max(newest_first, key=lambda result: result.step, default=None)


def _points(result: ProbeResult | None, quantity: str) -> list[Point]:
    return [p for p in result.points if p.quantity == quantity] if result else []


def _first(result: ProbeResult | None, quantity: str) -> Point | None:
    return next(iter(_points(result, quantity)), None)


def _last_metrics(run: RunFolder) -> dict[str, float]:
    steps = read_metrics(run.metrics_file).values()
    return {name: value for values in steps for name, value in values.items()}  # later steps replace earlier
