"""Everything a study measured as one tidy table, one row a number: all that the claims are computed from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_em.analysis.cells import Cell, StudyFolder
from lightning_em.analysis.claims.rules import Rules
from lightning_em.analysis.pairs import PairResult, read_pairs
from lightning_em.analysis.readings import Reading, readings
from lightning_em.analysis.trajectory_readings import PAIR_ROLE, CellReading, trajectory_readings
from lightning_em.manifest import write_atomically
from lightning_em.records import Point

logger = logging.getLogger(__name__)

COLUMNS = (
    "run", "arm", "role", "level", "adapter", "world", "seed", "step", "quantity", "value", "protocol",
)  # fmt: skip
PAIR_ANALYSES = ("adapter_cosine", "effect_cosine", "equal_norm", "gradient_cosine")
DIGITS = 6
_DTYPES = {"level": float, "seed": int, "step": int, "value": float}


def measurements(study: StudyFolder) -> pd.DataFrame:
    """All numbers of the finished runs of a study and of what was computed from several of them.

    Columns `COLUMNS`. A quantity has its place on a grid in its name, `bad_rate/held_out_domain@2` being the
    rate at scale 2. `step` is the checkpoint's; quantities that are followed through training have several.
    What the study says about its claims (`Rules`) has the role `study`.
    Numbers of several runs have the role `pair`, and their quantity begins with the analysis.
    `protocol` is what a number was measured by (see `protocol_of`): numbers of two runs are compared where it is
    the same. It is empty where the checkpoints alone determine the number, and for pairs, whose runs are measured
    together.
    Values are rounded to six digits, so that a table computed from the file is the one computed from the runs.

    Raises:
        ValueError: If no run is finished.
    """
    cells, finished = study.cells(), study.finished()
    if not finished:
        raise ValueError(
            f"none of the {len(cells)} runs of {study.root} is finished; `lightning-em study run` goes on."
        )
    if len(finished) < len(cells):
        logger.warning("%d of %d runs are not finished and left out", len(cells) - len(finished), len(cells))
    rows = [CellReading(cell, reading) for cell in finished for reading in readings(study.run(cell))]
    names = {cell.run for cell in finished}
    pairs = (pair for analysis in PAIR_ANALYSES for pair in read_pairs(study, analysis))
    rows += [row for pair in pairs if names.issuperset(pair.runs.values()) for row in _of_pair(pair)]
    rows += trajectory_readings(study, finished)
    return pd.concat([_frame(rows), _table(Rules(**study.rules).rows())], ignore_index=True)


def write_measurements(frame: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, frame.to_csv(index=False))


def read_measurements(path: Path) -> pd.DataFrame:
    """Read the table back, also from `.csv.gz`.

    Raises:
        ValueError: If there is no such file or a column is missing.
    """
    if not path.is_file():
        raise ValueError(f"there are no measurements at {path}; `lightning-em study report` writes them.")
    texts = {column: str for column in COLUMNS if column not in _DTYPES}  # an adapter may be called 32
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    if missing := [column for column in COLUMNS if column not in frame]:
        raise ValueError(f"{path} has no columns {missing}; write it again with `lightning-em study report`.")
    return frame[list(COLUMNS)].astype(_DTYPES).fillna({"arm": "", "protocol": ""})


def _frame(rows: list[CellReading]) -> pd.DataFrame:
    table = [
        {**_identity(row.cell), **row.reading._asdict(), "value": float(f"{row.reading.value:.{DIGITS}g}")}
        for row in rows
    ]
    frame = _table(table)
    # a norm may be on record and in the checkpoint: the record, which comes first, is kept
    return frame.drop_duplicates(["run", "role", "step", "quantity"], ignore_index=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(_DTYPES)


def _identity(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in asdict(cell).items() if key in COLUMNS}


def _of_pair(pair: PairResult) -> Iterator[CellReading]:
    cell = Cell("+".join(pair.runs.values()), "", PAIR_ROLE, None, pair.adapter, pair.world, pair.seed)
    return (CellReading(cell, _pair_reading(pair.analysis, point)) for point in pair.points)


def _pair_reading(analysis: str, point: Point) -> Reading:
    """`analysis/quantity/coordinate=value/...`; the step is the reading's own, a norm is named by its ratio."""
    place = dict(point.coordinates)
    step = int(place.pop("step", 0))
    if "norm_ratio" in place:
        place.pop("effective_norm", None)
    parts = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in place.items()
    ]
    return Reading(step, "/".join([analysis, point.quantity, *parts]), point.value)
