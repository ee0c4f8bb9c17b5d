"""All measurements of a study as one tidy table with one row per number, from which the claims are computed."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from lightning_em.analysis.cells import Cell, Reading, StudyFolder
from lightning_em.analysis.claims.rules import Rules
from lightning_em.analysis.pairs import PairResult, read_pairs
from lightning_em.analysis.trajectory_readings import CHECKPOINT, PAIR_ROLE, trajectory_readings
from lightning_em.manifest import write_atomically
from lightning_em.records import Point, ProbeResult, Quantity, declaration_of, read_metrics, read_results
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

COLUMNS = (
    "run", "arm", "role", "level", "adapter", "world", "seed",
    "step", "source", "quantity", "value", "unit", "protocol",
)  # fmt: skip
DIGITS = 6
_DTYPES = {"level": float, "seed": int, "step": int, "value": float}


def measurements(study: StudyFolder) -> pd.DataFrame:
    """Return all numbers of a study's finished runs, including those computed from several runs together.

    The columns are `COLUMNS`, then one column for each coordinate of any quantity, empty where a quantity does not
    have it. `source`, `step` and `protocol` are those of `Reading`. The study's own rules for its claims (`Rules`) have
    the role `study`, numbers of several runs the role `pair`. Values are rounded to six digits, so that tables computed
    from the file and from the runs agree.

    Raises:
        ValueError: If no run is finished.
    """
    cells, finished = study.cells(), study.finished()
    if not finished:
        raise ValueError(
            f"none of the {len(cells)} runs of {study.root} is finished; `lightning-em study run` continues them."
        )
    if len(finished) < len(cells):
        logger.warning("%d of %d runs are not finished and left out", len(cells) - len(finished), len(cells))
    readings = [reading for cell in finished for reading in run_readings(cell, study.run(cell))]
    names = {cell.run for cell in finished}
    pairs = (pair for pair in read_pairs(study) if names.issuperset(pair.runs.values()))
    readings += [reading for pair in pairs for reading in _pair_readings(pair)]
    readings += trajectory_readings(study, finished)
    return table_of([*readings, *Rules.from_fields(study.rules).readings()])


def run_readings(cell: Cell, run: RunFolder) -> Iterator[Reading]:
    """Yield the numbers of one run: what its probes declare for studies (`Quantity.in_study`), and validation losses.

    The values of a probe come from the last record of each step, so that a curve is never put together from two.

    Raises:
        ValueError: If a record is damaged.
    """
    for file in sorted(run.probe_folder.glob("*.jsonl")):
        by_step = _last_of_each_step(file)
        for step, result in by_step.items():
            repeated: dict[tuple[Quantity, tuple[Any, ...]], list[float]] = {}
            for point in result.points:
                quantity = declaration_of(point, result.quantities, result.probe)
                if quantity.in_study == "every" or (quantity.in_study == "last" and step == max(by_step)):
                    at = tuple(
                        each for each in point.coordinates.items() if each[0] not in quantity.mean_over
                    )
                    repeated.setdefault((quantity, at), []).append(point.value)
            for (quantity, at), values in repeated.items():
                mean = Point(quantity.name, fmean(values), quantity.unit, dict(at))
                if quantity.of_checkpoint:
                    yield Reading(cell, CHECKPOINT, step, mean)
                else:
                    yield Reading(cell, result.probe, step, mean, result.protocol)
    for step, losses in read_metrics(run.metrics_file).items():
        for name in ("val/ce", "val/kl"):
            if not math.isnan(loss := losses.get(name, math.nan)):
                yield Reading(cell, "metrics", step, Point(name, loss, "nats_per_token"))


def _last_of_each_step(file: Path) -> dict[int, ProbeResult]:
    results = read_results(file)
    if len({result.protocol for result in results}) > 1:
        logger.warning("%s holds records of several settings; those written last at each step count", file)
    return {result.step: result for result in results}


def _pair_readings(pair: PairResult) -> Iterator[Reading]:
    cell = Cell("+".join(pair.runs.values()), "", PAIR_ROLE, None, pair.adapter, pair.world, pair.seed)
    for point in pair.points:
        coordinates = dict(point.coordinates)
        step = int(coordinates.pop("step", 0))
        yield Reading(cell, pair.analysis, step, replace(point, coordinates=coordinates))


def table_of(readings: Sequence[Reading]) -> pd.DataFrame:
    """Return the table of some numbers; see `measurements`."""
    rows = [
        {
            **{column: getattr(reading.cell, column) for column in COLUMNS[:7]},
            "step": reading.step,
            "source": reading.source,
            "quantity": reading.point.quantity,
            "value": float(f"{reading.point.value:.{DIGITS}g}"),
            "unit": reading.point.unit,
            "protocol": reading.protocol,
            **reading.point.coordinates,
        }
        for reading in readings
    ]
    coordinates = sorted({key for row in rows for key in row} - set(COLUMNS))
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *coordinates]).astype(_DTYPES)
    # several sources may give a number that the checkpoint determines: keep the first one, a probe's
    return frame.drop_duplicates(frame.columns.drop(["value", "protocol"]), ignore_index=True)


def write_measurements(frame: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, frame.to_csv(index=False))


def read_measurements(path: Path) -> pd.DataFrame:
    """Read the table from `.csv` or `.csv.gz`.

    Raises:
        ValueError: If the file does not exist or a column is missing.
    """
    if not path.is_file():
        raise ValueError(f"there are no measurements at {path}; `lightning-em study report` writes them.")
    texts = {column: str for column in COLUMNS if column not in _DTYPES}  # an adapter may be named 32
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""], low_memory=False)
    if missing := [column for column in COLUMNS if column not in frame]:
        raise ValueError(f"{path} has no columns {missing}; write it again with `lightning-em study report`.")
    return frame.astype(_DTYPES).fillna({"arm": "", "unit": "", "protocol": ""})
