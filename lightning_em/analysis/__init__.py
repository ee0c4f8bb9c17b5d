"""Analysis: tables, curves and comparisons from the records of runs. Reads files and never imports torch."""

from lightning_em.analysis.curves import (
    LossCurve,
    at_equal_norm,
    common_grid,
    loss_curve,
    runs_by_base,
    sign_test,
)
from lightning_em.analysis.frames import metrics_frame, records_frame
from lightning_em.analysis.pairs import PairResult, read_pairs
from lightning_em.analysis.solutions import Estimate, Solution, base_of, median_solution, solution_of
from lightning_em.analysis.trajectory import (
    distance_share,
    norms_by_step,
    rotation,
    trajectory_pca,
)
from lightning_em.analysis.updates import (
    Update,
    last_update,
    read_update,
    update_cosine,
)

__all__ = [
    "Estimate",
    "LossCurve",
    "PairResult",
    "Solution",
    "Update",
    "at_equal_norm",
    "base_of",
    "common_grid",
    "distance_share",
    "last_update",
    "loss_curve",
    "median_solution",
    "metrics_frame",
    "norms_by_step",
    "read_pairs",
    "read_update",
    "records_frame",
    "rotation",
    "runs_by_base",
    "sign_test",
    "solution_of",
    "trajectory_pca",
    "update_cosine",
]
