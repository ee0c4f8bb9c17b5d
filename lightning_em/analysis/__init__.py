"""Analysis: what the records of runs say, side by side. Reads files, never imports torch."""

from lightning_em.analysis.curves import (
    EqualNorm,
    LossCurve,
    at_equal_norm,
    common_grid,
    loss_curve,
    runs_by_base,
    sign_test,
)
from lightning_em.analysis.frames import metrics_frame, records_frame
from lightning_em.analysis.solutions import Estimate, Solution, base_of, median_solution, solution_of

__all__ = [
    "EqualNorm",
    "Estimate",
    "LossCurve",
    "Solution",
    "at_equal_norm",
    "base_of",
    "common_grid",
    "loss_curve",
    "median_solution",
    "metrics_frame",
    "records_frame",
    "runs_by_base",
    "sign_test",
    "solution_of",
]
