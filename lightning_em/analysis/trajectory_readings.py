"""Trajectory quantities of a study's runs, computed from checkpoints, as named numbers."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lightning_em.analysis.cells import Cell, StudyFolder
from lightning_em.analysis.readings import Reading
from lightning_em.analysis.roles import KL_WEIGHT_ROLES
from lightning_em.analysis.trajectory import distance_share, norms_by_step, rotation, trajectory_pca
from lightning_em.analysis.updates import last_update

logger = logging.getLogger(__name__)

PAIR_ROLE = "pair"
BACK_TO = {"reverted": "general", "reverse": "narrow"}
NUM_COMPONENTS = 3
SHORTEST_ARM = 0.05
"""Minimum length of a turn's longer arm as a share of the final write direction's norm; shorter arms are noise."""


class CellReading(NamedTuple):
    """One number of one run, or of several runs together."""

    cell: Cell
    reading: Reading


def trajectory_readings(study: StudyFolder, cells: Sequence[Cell]) -> Iterator[CellReading]:
    """Yield numbers computed from the checkpoints of a study's runs.

    Runs without a valid checkpoint and adapters without low-rank parts are skipped with a warning.

    Quantities:
        `effective_norm`: effective norm at each checkpoint.
        `rotation/peak`, `rotation/peak_step`: largest local cosine of the trajectory of a general or narrow run,
            and its step. Their protocol is the number of steps between checkpoints, on which a turn depends.
        `pca/pc1` to `pca/pc3`: principal components of the runs at all KL weights, general run included, at each
            checkpoint. Signs are set so that the general run ends on the positive side.
        `pca/share_<i>`: share of the variance on component i, over all these runs together.
        `distance/covered`, `distance/projection`: progress of a reverted run towards the general solution, and
            of a reverse run towards the narrow solution; see `DistanceShare`.

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


def _norms(study: StudyFolder, group: Sequence[Cell]) -> Iterator[CellReading]:
    for cell in group:
        for step, norm in norms_by_step(study.run(cell)).items():
            yield CellReading(cell, Reading(step, "effective_norm", norm))


def _rotations(study: StudyFolder, group: Sequence[Cell]) -> Iterator[CellReading]:
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
            for name, value in (("peak", peak.cosine), ("peak_step", float(peak.step))):
                yield CellReading(cell, Reading(steps[-1], f"rotation/{name}", value, spacing))


def _components(study: StudyFolder, group: Sequence[Cell]) -> Iterator[CellReading]:
    cells = {cell.run: cell for cell in group if cell.role in KL_WEIGHT_ROLES}
    general = [cell.run for cell in cells.values() if cell.role == "general"]
    if len(cells) < 2 or not general:
        return
    pca = trajectory_pca({name: study.run(cell) for name, cell in cells.items()})
    places = pca.coordinates.sort_values("step").set_index("run")
    for name in [f"pc{number}" for number in range(1, NUM_COMPONENTS + 1) if f"pc{number}" in places]:
        # the sign of a principal component is arbitrary: set it by the general run's last checkpoint
        sign = 1.0 if places.loc[[general[0]], name].iloc[-1] >= 0 else -1.0
        for run, step, place in zip(places.index, places["step"], places[name], strict=True):
            yield CellReading(cells[run], Reading(int(step), f"pca/{name}", sign * float(place)))
    together = Cell("+".join(cells), "", PAIR_ROLE, None, group[0].adapter, group[0].world, group[0].seed)
    for number, share in enumerate(pca.explained_shares, start=1):
        yield CellReading(together, Reading(0, f"pca/share_{number}", share))


def _distances(study: StudyFolder, group: Sequence[Cell]) -> Iterator[CellReading]:
    by_run = {cell.run: cell for cell in group}
    for cell in group:
        ends = [other for other in group if other.role == BACK_TO.get(cell.role)]
        if not ends or cell.init_from not in by_run:
            continue
        trio = (last_update(study.run(one)) for one in (by_run[cell.init_from], ends[0], cell))
        share, step = distance_share(*trio), max(study.run(cell).steps())
        yield CellReading(cell, Reading(step, "distance/covered", share.covered))
        yield CellReading(cell, Reading(step, "distance/projection", share.projection))
