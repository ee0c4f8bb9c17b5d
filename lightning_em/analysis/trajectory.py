"""The way a solution takes through training: norms, turns, principal components, distances. Never imports torch."""

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
    """Checkpoints of several runs in the plane that holds most of their differences.

    Attributes:
        coordinates: One row a checkpoint: run, step, effective_norm, pc1, pc2, ...
        explained_shares: Share of the variance on each component, descending.
    """

    coordinates: pd.DataFrame
    explained_shares: tuple[float, ...]


class Turn(NamedTuple):
    """How a trajectory turns at one checkpoint.

    Attributes:
        step: Of the checkpoint.
        cosine: Between the way back and the way on: -1 straight, 0 a right angle, 1 a reversal.
        longer_arm: Length of the longer of the two.
    """

    step: int
    cosine: float
    longer_arm: float


class DistanceShare(NamedTuple):
    """How far an update has gone from a start to an end; 0 at the start, 1 at the end.

    Attributes:
        projection: Of its way on the straight line between them, sideways movement left out.
        covered: 1 - (distance still to go) / (distance of start and end); negative if it is farther from the
            end than the start is.
    """

    projection: float
    covered: float


def trajectory_pca(runs: Mapping[str, RunFolder], num_components: int = 5) -> TrajectoryPCA:
    """Standardise the write directions of all checkpoints and find their principal components.

    Args:
        runs: Of one adapter type, by name.
        num_components: Fewer come out where there are fewer checkpoints or numbers.

    Raises:
        ValueError: If there are fewer than two checkpoints, or the adapters declare no low-rank parts or differ in
            shape.

    Source: arXiv:2602.07852 (trajectory).
    """
    from sklearn.decomposition import PCA  # a second of imports that only this function needs
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
    # full: the default draws at random for large inputs, and a figure should be the same twice
    pca = PCA(min(num_components, *standard.shape), svd_solver="full")
    components = pca.fit_transform(standard)
    names = [f"pc{number}" for number in range(1, components.shape[1] + 1)]
    coordinates = pd.concat([pd.DataFrame(places), pd.DataFrame(components, columns=names)], axis="columns")
    return TrajectoryPCA(coordinates, tuple(map(float, pca.explained_variance_ratio_)))


def rotation(run: RunFolder, k: float = 0.0, span: int = 1) -> list[Turn]:
    """Local cosine cos(v[t-s] - v[t], v[t+s] - v[t]) of the write direction at each checkpoint t.

    Args:
        run: With checkpoints at even distances; where a neighbour is nearer than the other there is no turn.
        k: Keep a turn if its longer arm exceeds this: arms as short as the noise turn at random.
        span: s in checkpoints.

    Raises:
        ValueError: If `span` is not positive.

    Source: arXiv:2602.07852 (rotation; k is .0035 for its rank-1 LoRA).
    """
    if span < 1:
        raise ValueError(f"span must be 1 checkpoint or more, got {span}.")
    path = [(step, update.write_direction) for step, update in updates_by_step(run)]
    turns = []
    for (before, start), (step, here), (after, end) in zip(path, path[span:], path[2 * span :], strict=False):
        if step - before != after - step:
            continue
        back, on = start - here, end - here
        lengths = float(np.linalg.norm(back)), float(np.linalg.norm(on))
        if min(lengths) > 0 and max(lengths) > k:
            turns.append(Turn(step, float(back @ on) / (lengths[0] * lengths[1]), max(lengths)))
    return turns


def norms_by_step(run: RunFolder) -> dict[int, float]:
    """Effective norm of the adapter at each checkpoint."""
    return {step: update.effective_norm for step, update in updates_by_step(run)}


def distance_share(start: Update, end: Update, other: Update) -> DistanceShare:
    """How far `other` has gone from `start` towards `end`, in the space of updates.

    Args:
        start: Where it set out, e.g. the narrow solution.
        end: Where it may be going, e.g. the general solution.
        other: Where it is, e.g. the narrow solution trained on without KL.

    Raises:
        ValueError: If start and end are the same, or the adapters differ in kind.
    """
    trio = (start, end, other)
    gram = np.array([[inner_product(a, b) for b in trio] for a in trio])
    line, way, left = np.array([-1.0, 1, 0]), np.array([-1.0, 0, 1]), np.array([0, 1.0, -1])
    length = float(line @ gram @ line)
    if length <= 0:
        raise ValueError(
            "start and end are the same update: there is no way between them to take a share of."
        )
    remaining = max(0.0, float(left @ gram @ left))
    return DistanceShare(float(way @ gram @ line) / length, 1 - (remaining / length) ** 0.5)
