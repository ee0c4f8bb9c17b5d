"""All measurements of a study as one tidy table with one row per number, from which the claims are computed."""

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
    """Return all numbers of a study's finished runs, including those computed from several runs together.

    The columns are `COLUMNS`. The name of a quantity includes its coordinate on a grid: for example,
    `bad_rate/held_out_domain@2` is the rate at scale 2. `step` is the step of the checkpoint; quantities that are
    followed through training have several steps. The study's own rules for its claims (`Rules`) have the role
    `study`. Numbers of several runs have the role `pair`, and their quantity begins with the name of the analysis.
    `protocol` identifies how a number was measured (see `protocol_of`). Numbers of two runs are compared only if
    their protocols match. It is empty if the checkpoints alone determine the number, and for pairs, whose runs
    are measured together. Values are rounded to six digits, so that tables computed from the file and from the
    runs agree.

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
    # a norm may come from the record and from the checkpoint: keep the record's, which comes first
    return frame.drop_duplicates(["run", "role", "step", "quantity"], ignore_index=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(_DTYPES)


def _identity(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in asdict(cell).items() if key in COLUMNS}


def _of_pair(pair: PairResult) -> Iterator[CellReading]:
    cell = Cell("+".join(pair.runs.values()), "", PAIR_ROLE, None, pair.adapter, pair.world, pair.seed)
    return (CellReading(cell, _pair_reading(pair.analysis, point)) for point in pair.points)


def _pair_reading(analysis: str, point: Point) -> Reading:
    """Name a point `analysis/quantity/coordinate=value/...`.

    The coordinate `step` becomes the reading's step, and `norm_ratio` replaces `effective_norm`.
    """
    place = dict(point.coordinates)
    step = int(place.pop("step", 0))
    if "norm_ratio" in place:
        place.pop("effective_norm", None)
    parts = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in place.items()
    ]
    return Reading(step, "/".join([analysis, point.quantity, *parts]), point.value)
