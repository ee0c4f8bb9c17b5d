"""Training trajectories of solutions: norms, turns, principal components, distances. Never imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_em.analysis.updates import Update, inner_product, updates_by_step
from lightning_em.runs import RunFolder


@dataclass(frozen=True)
class TrajectoryPCA:
    """Checkpoints of several runs in their principal components.

    Attributes:
        coordinates: Table with one row per checkpoint: run, step, effective_norm, pc1, pc2, ...
        explained_shares: Share of the variance on each component, descending.
    """

    coordinates: pd.DataFrame
    explained_shares: tuple[float, ...]


class Turn(NamedTuple):
    """Turn of a trajectory at one checkpoint.

    Attributes:
        step: Step of the checkpoint.
        cosine: Cosine between the differences to the previous and the next checkpoint: -1 straight, 0 a right
            angle, 1 a reversal.
        longer_arm: Length of the longer of the two differences.
    """

    step: int
    cosine: float
    longer_arm: float


class DistanceShare(NamedTuple):
    """Share of the distance from a start to an end that an update has covered; 0 at the start, 1 at the end.

    Attributes:
        projection: Projection of (update - start) onto (end - start), as a share of the length of (end - start);
            sideways movement does not count.
        covered: 1 - (distance from the end) / (distance between start and end); negative if the update is
            farther from the end than the start is.
    """

    projection: float
    covered: float


def trajectory_pca(runs: Mapping[str, RunFolder], num_components: int = 5) -> TrajectoryPCA:
    """Standardize the write directions of all checkpoints and compute their principal components.

    Args:
        runs: Runs of one adapter type, by name.
        num_components: Maximum number of components; limited by the number of checkpoints and of features.

    Raises:
        ValueError: If there are fewer than two checkpoints, or the adapters declare no low-rank parts or differ in
            shape.

    Source: arXiv:2602.07852 (trajectory).
    """
    from sklearn.decomposition import PCA  # imported here: it takes a second, and only this function needs it
    from sklearn.preprocessing import StandardScaler

    places: list[dict[str, str | int | float]] = []
    features: list[npt.NDArray[np.float64]] = []
    for name, run in runs.items():
        for step, update in updates_by_step(run):
            places.append({"run": name, "step": step, "effective_norm": update.effective_norm})
            features.append(update.write_direction)
    if len(features) < 2 or len({len(feature) for feature in features}) > 1:
        raise ValueError(
            "principal components need two checkpoints or more of one adapter type, got "
            f"{len(features)} of {sorted({len(feature) for feature in features})} numbers from {sorted(runs)}."
        )
    standard = StandardScaler().fit_transform(np.stack(features))
    # the default solver is randomized for large inputs; "full" makes figures reproducible
    pca = PCA(min(num_components, *standard.shape), svd_solver="full")
    components = pca.fit_transform(standard)
    names = [f"pc{number}" for number in range(1, components.shape[1] + 1)]
    coordinates = pd.concat([pd.DataFrame(places), pd.DataFrame(components, columns=names)], axis="columns")
    return TrajectoryPCA(coordinates, tuple(map(float, pca.explained_variance_ratio_)))


def rotation(run: RunFolder, k: float = 0.0, span: int = 1) -> list[Turn]:
    """Compute the local cosine cos(v[t-s] - v[t], v[t+s] - v[t]) of the write direction at each checkpoint t.

    Args:
        run: Run with evenly spaced checkpoints; checkpoints with unequal distances to their neighbors are skipped.
        k: Minimum length of the longer arm; shorter arms are dominated by noise and turn at random.
        span: s in checkpoints.

    Raises:
        ValueError: If `span` is not positive.

    Source: arXiv:2602.07852 (rotation; k is .0035 for its rank-1 LoRA).
    """
    if span < 1:
        raise ValueError(f"span must be 1 checkpoint or more, got {span}.")
    path = [(step, update.write_direction) for step, update in updates_by_step(run)]
    turns = []
    # checkpoints t - s, t and t + s; strict=False drops the ends, which have a neighbor on one side only
    for (before, start), (step, here), (after, end) in zip(path, path[span:], path[2 * span :], strict=False):
        if step - before != after - step:
            continue
        back, on = start - here, end - here
        lengths = float(np.linalg.norm(back)), float(np.linalg.norm(on))
        if min(lengths) > 0 and max(lengths) > k:
            turns.append(Turn(step, float(back @ on) / (lengths[0] * lengths[1]), max(lengths)))
    return turns


def norms_by_step(run: RunFolder) -> dict[int, float]:
    """Return the effective norm of the adapter at each checkpoint."""
    return {step: update.effective_norm for step, update in updates_by_step(run)}


def distance_share(start: Update, end: Update, other: Update) -> DistanceShare:
    """Compute how far `other` has moved from `start` towards `end`, in the space of updates.

    Args:
        start: Update at the start, e.g. the narrow solution.
        end: Update at the end, e.g. the general solution.
        other: Update to locate, e.g. the narrow solution trained further without KL.

    Raises:
        ValueError: If start and end are the same, or the adapters differ in kind.
    """
    trio = (start, end, other)
    # Updates are never formed as matrices. Each difference is a coefficient vector over the trio, and its inner
    # products follow from the Gram matrix: <u, v> = u^T G v.
    gram = np.array([[inner_product(a, b) for b in trio] for a in trio])
    line, way, left = np.array([-1.0, 1, 0]), np.array([-1.0, 0, 1]), np.array([0, 1.0, -1])
    length = float(line @ gram @ line)
    if length <= 0:
        raise ValueError(
            "start and end are the same update: there is no way between them to take a share of."
        )
    remaining = max(0.0, float(left @ gram @ left))
    return DistanceShare(float(way @ gram @ line) / length, 1 - (remaining / length) ** 0.5)
