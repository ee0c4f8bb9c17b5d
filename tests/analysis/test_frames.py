import pytest

from lightning_em.analysis import metrics_frame, records_frame, solution_of
from lightning_em.analysis.cells import Cell, Reading
from lightning_em.analysis.measurements import run_readings
from lightning_em.records import Point, ProbeResult, append_lines
from lightning_em.runs import RunFolder

CURVE = (
    Point("ce", 1.5, "nats_per_token", {"scale": 0.0, "draw": 0.0}, 0.25, 40, (1.0, 2.0)),
    Point("ce", 1.0, "nats_per_token", {"scale": 1.0, "draw": 3.0}, None, 40),
    Point("best_scale", 1.0, "scale", {"method": "grid"}),
)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with two probes; the first was run twice at step 4."""
    run = RunFolder(tmp_path / "run")
    for step in (2, 4, 4):
        line = ProbeResult("scale_curve", step, {}, CURVE).to_json()
        append_lines(run.probe_file("scale_curve"), line)
    point = Point("bad_rate", 0.5, "probability", {"kind": "medical", "scale": 1.0})
    append_lines(run.probe_file("behaviour"), ProbeResult("behaviour", 4, {}, (point,)).to_json())
    append_lines(run.metrics_file, "step,name,value", "1,train/ce,0.1", "2,train/ce,0.30000000000000004")
    append_lines(run.metrics_file, "2,val/ce,2.0")
    return run


def test_every_point_is_a_row(run) -> None:
    frame = records_frame(run)
    assert len(frame) == 3 * len(CURVE) + 1
    first = frame[frame.probe == "scale_curve"].iloc[0]
    assert (first.step, first.quantity, first.value, first.unit) == (2, "ce", 1.5, "nats_per_token")
    assert (first.standard_error, first["count"], first.scale, first.draw) == (0.25, 40, 0.0, 0.0)


def test_coordinates_that_a_point_has_not_are_empty(run) -> None:
    frame = records_frame(run)
    best = frame[frame.quantity == "best_scale"]
    assert best.scale.isna().all()
    assert set(best.method) == {"grid"}
    assert frame[frame.probe == "behaviour"].draw.isna().all()


def test_second_measurement_of_a_step_can_be_told_from_the_first(run) -> None:
    frame = records_frame(run)
    at_four = frame[(frame.probe == "scale_curve") & (frame.step == 4)]
    assert sorted(at_four.measurement.unique()) == [2, 3]
    assert not frame.duplicated(["probe", "step", "measurement", "quantity", "scale", "kind", "method"]).any()


def test_metrics_are_exact_and_have_a_row_a_step(run) -> None:
    frame = metrics_frame(run)
    assert list(frame.index) == [1, 2]
    assert frame.loc[2, "train/ce"] == 0.30000000000000004
    assert frame["val/ce"].isna().tolist() == [True, False]


def test_metric_twice_at_one_step_is_refused(run) -> None:
    append_lines(run.metrics_file, "2,val/ce,2.5")
    with pytest.raises(ValueError, match=r"has val/ce twice at step 2"):
        metrics_frame(run)


def test_metric_measured_again_at_a_resumed_step_is_one_value(run) -> None:
    append_lines(run.metrics_file, "2,val/ce,2.0000000001", "1,train/ce,0.1")
    frame = metrics_frame(run)
    assert frame.to_dict("index")[2] == {"train/ce": 0.30000000000000004, "val/ce": 2.0000000001}
    assert (list(frame.index), list(frame)) == ([1, 2], ["train/ce", "val/ce"])
    cell = Cell("run", "general", "general", None, "rank1", "default", 0)
    (run.probe_folder / "behaviour.jsonl").unlink()
    (run.probe_folder / "scale_curve.jsonl").unlink()
    assert list(run_readings(cell, run)) == [
        Reading(cell, "metrics", 2, Point("val/ce", 2.0000000001, "nats_per_token"))
    ]
    assert solution_of(run, "resumed").ce == 2.0000000001


def test_run_without_records_gives_empty_frames(tmp_path) -> None:
    run = RunFolder(tmp_path)
    assert records_frame(run).empty
    assert metrics_frame(run).empty
