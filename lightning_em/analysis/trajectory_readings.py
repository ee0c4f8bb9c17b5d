"""Trajectory quantities of a study's runs, computed from checkpoints."""

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from lightning_em.analysis.cells import Cell, Reading, StudyFolder
from lightning_em.analysis.roles import KL_WEIGHT_ROLES
from lightning_em.analysis.trajectory import distance_share, norms_by_step, rotation, trajectory_pca
from lightning_em.analysis.updates import last_update
from lightning_em.records import Point

logger = logging.getLogger(__name__)

PAIR_ROLE = "pair"
CHECKPOINT = "checkpoint"
"""Source of the numbers that a checkpoint alone determines."""
BACK_TO = {"reverted": "general", "reverse": "narrow"}
NUM_COMPONENTS = 3
SHORTEST_ARM = 0.05
"""Minimum length of a turn's longer arm as a share of the final write direction's norm; shorter arms are noise."""


def trajectory_readings(study: StudyFolder, cells: Sequence[Cell]) -> Iterator[Reading]:
    """Yield numbers computed from the checkpoints of a study's runs.

    Runs without a valid checkpoint and adapters without low-rank parts are skipped with a warning.

    Quantities by source:
        checkpoint: `effective_norm` at each checkpoint.
        rotation: `peak` and `peak_step`, the largest local cosine of the trajectory of a general or narrow run, and
            its step. Their protocol is the number of steps between checkpoints, on which a turn depends.
        pca: `position` of each checkpoint on each `component` (1 to 3) of the runs at all KL weights, general run
            included. Signs are set so that the general run ends on the positive side. `share` of the variance on each
            `component`, over all these runs together.
        distance: `covered` and `projection`, the progress of a reverted run towards the general solution, and of a
            reverse run towards the narrow solution; see `DistanceShare`.

    Args:
        study: Study folder.
        cells: Cells to read, usually the finished ones.
    """
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        if study.run(cell).newest_valid_step() is None:
            logger.warning("%s has no valid checkpoint: its trajectory is left out", cell.run)
            continue
        groups.setdefault((cell.adapter, cell.world, cell.seed), []).append(cell)
    for group in groups.values():
        for read in (_norms, _rotations, _components, _distances):
            try:
                yield from list(read(study, group))
            except (ValueError, FileNotFoundError) as error:
                logger.warning(
                    "%s, %s world, seed %d: %s", group[0].adapter, group[0].world, group[0].seed, error
                )


def _norms(study: StudyFolder, group: Sequence[Cell]) -> Iterator[Reading]:
    for cell in group:
        for step, norm in norms_by_step(study.run(cell)).items():
            yield Reading(cell, CHECKPOINT, step, Point("effective_norm", norm, "norm"))


def _rotations(study: StudyFolder, group: Sequence[Cell]) -> Iterator[Reading]:
    for cell in group:
        if cell.role not in ("general", "narrow"):
            continue
        run = study.run(cell)
        length = float(np.linalg.norm(last_update(run).write_direction))
        turns = rotation(run, k=SHORTEST_ARM * length)
        if turns:
            peak = max(turns, key=lambda turn: turn.cosine)
            steps = run.steps()
            spacing = f"every {min(after - before for before, after in itertools.pairwise(steps))} steps"
            for point in (
                Point("peak", peak.cosine, "cosine"),
                Point("peak_step", float(peak.step), "steps"),
            ):
                yield Reading(cell, "rotation", steps[-1], point, spacing)


def _components(study: StudyFolder, group: Sequence[Cell]) -> Iterator[Reading]:
    cells = {cell.run: cell for cell in group if cell.role in KL_WEIGHT_ROLES}
    general = [cell.run for cell in cells.values() if cell.role == "general"]
    if len(cells) < 2 or not general:
        return
    pca = trajectory_pca({name: study.run(cell) for name, cell in cells.items()})
    places = pca.coordinates.sort_values("step").set_index("run")
    for number in [n for n in range(1, NUM_COMPONENTS + 1) if f"pc{n}" in places]:
        name = f"pc{number}"
        # the sign of a principal component is arbitrary: set it by the general run's last checkpoint
        sign = 1.0 if places.loc[[general[0]], name].iloc[-1] >= 0 else -1.0
        for run, step, place in zip(places.index, places["step"], places[name], strict=True):
            point = Point("position", sign * float(place), "standardized", {"component": number})
            yield Reading(cells[run], "pca", int(step), point)
    together = Cell("+".join(cells), "", PAIR_ROLE, None, group[0].adapter, group[0].world, group[0].seed)
    for number, share in enumerate(pca.explained_shares, start=1):
        yield Reading(together, "pca", 0, Point("share", share, "share", {"component": number}))


def _distances(study: StudyFolder, group: Sequence[Cell]) -> Iterator[Reading]:
    by_run = {cell.run: cell for cell in group}
    for cell in group:
        ends = [other for other in group if other.role == BACK_TO.get(cell.role)]
        if not ends or cell.init_from not in by_run:
            continue
        trio = (last_update(study.run(one)) for one in (by_run[cell.init_from], ends[0], cell))
        share, step = distance_share(*trio), max(study.run(cell).steps())
        for name, value in (("covered", share.covered), ("projection", share.projection)):
            yield Reading(cell, "distance", step, Point(name, value, "share"))
