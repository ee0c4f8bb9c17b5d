"""A run's metrics and records as pandas frames."""

from typing import Any

import pandas as pd

from lightning_em.records import Point, ProbeResult, read_metrics, read_results
from lightning_em.runs import RunFolder

POINT_COLUMNS = (
    "probe", "step", "measurement", "protocol", "quantity", "value", "unit", "standard_error", "count",
)  # fmt: skip


def metrics_frame(run: RunFolder) -> pd.DataFrame:
    """Return the metrics of a run: one row per step, one column per metric, NaN where a step lacks the metric.

    Raises:
        ValueError: If a step has two values of one metric.
    """
    frame = pd.DataFrame.from_dict(read_metrics(run.metrics_file), orient="index", dtype=float)
    return frame.rename_axis(index="step").sort_index(axis="columns")


def records_frame(run: RunFolder) -> pd.DataFrame:
    """Return the points of all probes at all steps: one row per point, one column per coordinate.

    Columns: probe, step, measurement (line of the probe's file, from 1; one step measured with two settings gives
    two measurements), protocol (see `ProbeResult.protocol`), quantity, value, unit, standard_error, count. Then one
    column for each coordinate of any probe, empty where a point does not have it. `per_example` values are not
    included.
    """
    rows = [
        _row(result, number, protocol, point)
        for file in sorted(run.probe_folder.glob("*.jsonl"))
        for number, result in enumerate(read_results(file), start=1)
        for protocol in [result.protocol]
        for point in result.points
    ]
    coordinates = list(dict.fromkeys(key for row in rows for key in row if key not in POINT_COLUMNS))
    frame = pd.DataFrame(rows, columns=[*POINT_COLUMNS, *coordinates])
    return frame.astype({"value": float, "standard_error": float, "count": "Int64"})


def _row(result: ProbeResult, number: int, protocol: str, point: Point) -> dict[str, Any]:
    return {
        "probe": result.probe,
        "step": result.step,
        "measurement": number,
        "protocol": protocol,
        "quantity": point.quantity,
        "value": point.value,
        "unit": point.unit,
        "standard_error": point.standard_error,
        "count": point.count,
        **point.coordinates,
    }
