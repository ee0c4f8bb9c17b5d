"""The tidy table holds what the runs recorded, under the names that claims are written in."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from lightning_em import miniature, probes
from lightning_em.analysis import PairResult
from lightning_em.analysis.cells import Cell, StudyFolder
from lightning_em.analysis.claims import evaluate
from lightning_em.analysis.measurements import (
    COLUMNS,
    measurements,
    read_measurements,
    run_readings,
    write_measurements,
)
from lightning_em.manifest import publish
from lightning_em.records import Point, ProbeResult, Quantity, append_lines
from lightning_em.runs import RunFolder
from tests.samples import vector_config

NATS = "nats_per_token"
CELL = Cell("run", "general", "general", None, "rank1", "default", 0)
BUILT_IN = {
    each.name: each.quantities
    for each in (miniature.Behaviour, *(getattr(probes, name) for name in probes.__all__))
    if hasattr(each, "quantities")
}


def record(run: RunFolder, probe: str, step: int, *points: Point, base: str | None = None) -> None:
    """A record as the probe of that name writes it; a probe that is not one of ours declares what it measured."""
    own = tuple(Quantity(p.quantity, p.unit, tuple(p.coordinates)) for p in points)
    result = ProbeResult(probe, step, {}, points, base=base, quantities=BUILT_IN.get(probe, own))
    append_lines(run.probe_file(probe), result.to_json())


def numbers_of(run: RunFolder) -> dict[tuple, float]:
    """Values by step, source, quantity and the values of the coordinates."""
    return {
        (r.step, r.source, r.point.quantity, *r.point.coordinates.values()): r.point.value
        for r in run_readings(CELL, run)
    }


def rate(value: float, scale: float, name: str = "bad_rate", kind: str = "held_out_domain") -> Point:
    return Point(name, value, "probability", {"kind": kind, "scale": scale})


def curve(norm: float, base: float, trained: float) -> tuple[Point, ...]:
    return (
        Point("ce", base, NATS, {"scale": 0.0}),
        Point("ce", trained, NATS, {"scale": 1.0}),
        Point("ce_minus_base", trained - base, NATS, {"scale": 1.0}),
        Point("best_scale", 1.0, "scale", {"method": "grid"}),
        Point("best_scale", 1.07, "scale", {"method": "parabola"}),
        Point("effective_norm", norm, "norm"),
        Point("efficiency", (base - trained) / norm**2, "nats_per_token_per_squared_norm"),
    )


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with every probe, its behaviour looked at twice at the last step."""
    run = RunFolder(tmp_path / "run")
    record(run, "behaviour", 50, rate(0.2, 1.0), rate(0.3, 2.0))
    record(run, "behaviour", 100, rate(0.4, 1.0), rate(0.45, 5.0))
    record(
        run,
        "behaviour",
        100,
        rate(0.41, 1.0),
        rate(0.5, 20.0),
        rate(0.1, 1.0, "style_rate"),
        rate(0.6, 1.0, kind="self_description"),
    )
    record(run, "scale_curve", 50, *curve(3.0, 2.5, 1.5))
    record(run, "scale_curve", 100, *curve(4.0, 2.5, 0.5))
    record(
        run, "perturbation_curve", 100,
        Point("lost_gain_mean", 7.0, "percent", {"strength": 0.2}, 0.5, 10),
        Point("lost_gain_sd", 1.0, "percent", {"strength": 0.2}, None, 10),
        Point("ce_increase", 6.0, NATS, {"strength": 0.2, "noise": 0}),
        Point("displacement_mean", 1.5, "norm", {"strength": 0.2}, 0.1, 10),
        Point("displacement", 1.4, "norm", {"strength": 0.2, "noise": 0}),
        Point("ce_mean", 0.6, NATS, {"strength": 0.2}),
    )  # fmt: skip
    record(run, "chat_kl", 100, Point("kl", 0.25, NATS, {"prompts": "in_domain", "scale": 1.0}))
    drawn = [
        Point("kl", v, NATS, {"direction": "random", "draw": i, "norm_ratio": 1.0})
        for i, v in enumerate((1.0, 3.0))
    ]
    record(
        run,
        "significance",
        100,
        Point("kl", 9.0, NATS, {"direction": "adapter", "draw": 0, "norm_ratio": 1.0}),
        *drawn,
    )
    record(
        run, "gradient", 100,
        Point("ce_gradient_norm", 0.5, "nats_per_token_per_unit"),
        Point("ce_gradient_norm", 0.4, "nats_per_token_per_unit", {"tensor": "a"}),
    )  # fmt: skip
    record(run, "preference_margin", 100, Point("margin", -0.7, NATS, {"kind": "law", "scale": 1.0}))
    record(run, "probe_of_a_user", 100, Point("ce", 0.0, NATS, {"scale": 1.0}))
    append_lines(run.metrics_file, "step,name,value", "50,val/ce,0.9", "100,val/ce,0.4", "100,train/ce,0.3")
    return run


def test_names_and_values(run) -> None:
    # not .45 at scale 5, which only an earlier record of the last step has: a curve is one record's
    assert numbers_of(run) == {
        (50, "behaviour", "bad_rate", "held_out_domain", 1.0): 0.2,  # followed through training
        (50, "behaviour", "bad_rate", "held_out_domain", 2.0): 0.3,
        (50, "checkpoint", "effective_norm"): 3.0,
        (50, "metrics", "val/ce"): 0.9,
        (100, "behaviour", "bad_rate", "held_out_domain", 1.0): 0.41,  # the later measurement of the step
        (100, "behaviour", "bad_rate", "held_out_domain", 20.0): 0.5,
        (100, "behaviour", "bad_rate", "self_description", 1.0): 0.6,
        (100, "behaviour", "style_rate", "held_out_domain", 1.0): 0.1,
        (100, "scale_curve", "best_scale", "grid"): 1.0,
        (100, "scale_curve", "best_scale", "parabola"): 1.07,
        (100, "scale_curve", "ce", 0.0): 2.5,
        (100, "scale_curve", "ce", 1.0): 0.5,
        (100, "checkpoint", "effective_norm"): 4.0,
        (100, "scale_curve", "efficiency"): 2.0 / 16,
        (100, "perturbation_curve", "displacement_mean", 0.2): 1.5,
        (100, "perturbation_curve", "lost_gain_mean", 0.2): 7.0,
        (100, "perturbation_curve", "ce_mean", 0.2): 0.6,
        (100, "chat_kl", "kl", "in_domain", 1.0): 0.25,
        (100, "significance", "kl", "adapter", 1.0): 9.0,
        (100, "significance", "kl", "random", 1.0): 2.0,  # mean of the draws
        (100, "gradient", "ce_gradient_norm"): 0.5,
        (100, "preference_margin", "margin", "law", 1.0): -0.7,
        (100, "probe_of_a_user", "ce", 1.0): 0.0,
        (100, "metrics", "val/ce"): 0.4,
    }


def test_curve_is_that_of_the_newest_record(tmp_path) -> None:
    run = RunFolder(tmp_path)
    for ce, scales in ((9.0, (0.0, 1.0, 2.0)), (1.0, (0.0, 1.0))):
        record(run, "scale_curve", 100, *(Point("ce", ce, NATS, {"scale": scale}) for scale in scales))
    assert numbers_of(run) == {(100, "scale_curve", "ce", scale): 1.0 for scale in (0.0, 1.0)}
    assert numbers_of(RunFolder(tmp_path / "none")) == {}


def test_a_record_of_what_its_probe_does_not_declare_is_refused(tmp_path) -> None:
    run = RunFolder(tmp_path)
    record(run, "chat_kl", 100, Point("kl", 0.25, "bits", {"prompts": "general", "scale": 1.0}))
    with pytest.raises(
        ValueError, match=r"the probe chat_kl measured .*'bits'.* but declares \[\('kl', 'nats_per_token'"
    ):
        numbers_of(run)


def vector_run(folder, path, kind: str = "lightning_em.adapters.SteeringVector") -> RunFolder:
    """A finished run of a steering vector whose checkpoints are the points of `path`, by step."""
    run = RunFolder(folder)
    run.update_run(status="finished")
    for step, point in path.items():

        def fill(temporary, point=point):
            save_file(
                {"vector": np.asarray(point, dtype=np.float32)}, temporary / "adapter_model.safetensors"
            )
            config = vector_config(1.0, 2, kind, has_update=kind.endswith(".SteeringVector"))
            (temporary / "adapter_config.json").write_text(json.dumps(config))

        publish(run.checkpoint(step), fill)
    record(run, "scale_curve", max(path), *curve(1.0, 2.0, 1.0))
    return run


WAYS = {
    "general": {0: (0, 0), 10: (2, 0), 20: (4, 0), 30: (4, 2)},  # a right angle at step 20
    "narrow": {0: (0, 0), 10: (0, 1), 20: (0, 2), 30: (0, 3)},  # straight
    "reverted": {0: (0, 3), 10: (2, 2.5)},
}


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    """Three vectors with known ways and a pair analysis that was repeated."""
    study = StudyFolder(tmp_path / "study")
    start = {"reverted": "narrow-0"}
    cells = [
        Cell(
            f"{role}-0",
            role,
            role,
            10.0 if role == "narrow" else None,
            "vector",
            "default",
            0,
            start.get(role),
        )
        for role in WAYS
    ]
    study.write("three", [*cells, Cell("reverse-0", "reverse", "reverse", None, "vector", "default", 0)])
    for cell in cells:
        vector_run(study.run(cell).path, WAYS[cell.role])
    for value in (0.5, 0.7):
        points = (
            Point(
                "gradient_cosine", value, "cosine", {"solution": "narrow", "step": 10, "target": "general"}
            ),
            Point("ce", value, NATS, {"norm_ratio": 0.2}),
        )
        runs = {"general": "general-0", "narrow": "narrow-0"}
        pair = PairResult("gradient_cosine", "vector", "default", 0, runs, {"general": 30}, {}, {}, points)
        pair.append_to(study)
    return study


def value(frame: pd.DataFrame, role: str, source: str, quantity: str, **coordinates) -> float:
    rows = frame[(frame["role"] == role) & (frame["source"] == source) & (frame["quantity"] == quantity)]
    for name, place in coordinates.items():
        rows = rows[rows[name] == place]
    [found] = rows["value"]
    return found


def test_measurements_of_runs_pairs_and_trajectories(study, caplog) -> None:
    frame = measurements(study)
    assert list(frame) == [*COLUMNS, "component", "method", "norm_ratio", "scale", "solution", "target"]
    assert "1 of 4 runs are not finished and left out" in caplog.text
    assert value(frame, "general", "scale_curve", "ce", scale=1.0) == 1.0
    assert (
        value(frame, "pair", "gradient_cosine", "gradient_cosine", solution="narrow", target="general") == 0.7
    )
    assert value(frame, "pair", "gradient_cosine", "ce", norm_ratio=0.2) == 0.7
    assert value(frame, "general", "rotation", "peak") == pytest.approx(0.0, abs=1e-6)
    assert value(frame, "general", "rotation", "peak_step") == 20
    assert value(frame, "narrow", "rotation", "peak") == pytest.approx(-1.0)
    turns = frame[frame["quantity"] == "peak"]
    assert set(turns["protocol"]) == {"every 10 steps"}, "a turn depends on how far apart checkpoints are"
    # from (0, 3) towards (4, 2): sqrt 17 away, and sqrt(4 + .25) left
    assert value(frame, "reverted", "distance", "covered") == pytest.approx(1 - (4.25 / 17) ** 0.5, rel=1e-5)
    assert value(frame, "reverted", "distance", "projection") == pytest.approx(
        (2 * 4 + 0.5 * 1) / 17, rel=1e-5
    )


def test_components_are_scikit_learns(study) -> None:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    frame = measurements(study)
    points = [point for role in ("general", "narrow") for point in WAYS[role].values()]
    oracle = (
        PCA().fit(StandardScaler().fit_transform(np.array(points, dtype=float))).explained_variance_ratio_
    )
    assert [value(frame, "pair", "pca", "share", component=i) for i in (1, 2)] == pytest.approx(
        list(oracle), rel=1e-5
    )
    places = PCA().fit_transform(StandardScaler().fit_transform(np.array(points, dtype=float)))
    steps = [(role, step) for role in ("general", "narrow") for step in WAYS[role]]
    end_of_general = steps.index(("general", 30))
    for number in (1, 2):
        rows = frame[(frame["quantity"] == "position") & (frame["component"] == number)]
        found = rows.set_index(["role", "step"])["value"]
        expected = places[:, number - 1] * np.sign(places[end_of_general, number - 1])
        assert list(found[steps]) == pytest.approx(list(expected), rel=1e-5, abs=1e-6)
    assert set(frame["component"].dropna()) == {1, 2}, "vectors of two numbers have two components"


def test_runs_without_a_valid_checkpoint_are_named_once_and_left_out(study, caplog) -> None:
    run = study.run(study.cells()[0])
    for step in run.steps():
        (run.checkpoint(step) / "adapter_model.safetensors").write_bytes(b"")
    frame = measurements(study)
    assert caplog.text.count("general-0 has no valid checkpoint: its trajectory is left out") == 1
    assert value(frame, "narrow", "rotation", "peak") == pytest.approx(-1.0)
    assert value(frame, "general", "scale_curve", "ce", scale=1.0) == 1.0
    assert not (frame["source"] == "pca").any()


def test_runs_on_two_base_models_are_not_compared(tmp_path) -> None:
    """General is measured on base model a, narrow on base model b."""
    study = StudyFolder(tmp_path)
    levels = {"general": None, "narrow": 10.0}
    cells = [
        Cell(f"{role}-{seed}", role, role, level, "vector", "default", seed)
        for role, level in levels.items()
        for seed in range(5)
    ]
    study.write("two base models", cells, {"rise": 0.1, "narrow": 0.05})
    for cell in cells:
        run = study.run(cell)
        run.update_run(status="finished")
        held_out = 0.5 if cell.role == "general" else 0.0
        answers = [
            rate(0.0, 0.0, kind="narrow_seen"),
            rate(0.9, 1.0, kind="narrow_seen"),
            rate(held_out, 1.0),
        ]
        record(run, "behaviour", 100, *answers, base="a")
    assert evaluate(measurements(study), ["C2"])[0].verdict == "holds"
    for cell in cells[5:]:
        record(study.run(cell), "behaviour", 100, *answers, base="b")
    found = evaluate(measurements(study), ["C2"])[0]
    assert (found.verdict, found.findings[2].n) == ("not measured", 0)
    assert (
        "behaviour/bad_rate[kind=held_out_domain] of general-0 and narrow-0 was measured with other settings"
        in found.note
    )


@pytest.mark.parametrize("name", ["measurements.csv", "measurements.csv.gz"])
def test_table_read_back_is_the_table(study, tmp_path, name) -> None:
    frame = measurements(study)
    if name.endswith(".gz"):
        frame.to_csv(tmp_path / name, index=False)
    else:
        write_measurements(frame, tmp_path / name)
    pd.testing.assert_frame_equal(read_measurements(tmp_path / name), frame, check_dtype=False)


def test_names_that_are_numbers_stay_names(study, tmp_path) -> None:
    numbers = {
        "run": "007",
        "arm": "1",
        "role": "2",
        "adapter": "32",
        "world": "1e3",
        "quantity": "3",
        "source": "4",
    }
    write_measurements(measurements(study).assign(**numbers), tmp_path / "measurements.csv")
    frame = read_measurements(tmp_path / "measurements.csv")
    assert frame[list(numbers)].drop_duplicates().to_dict("records") == [numbers]
    assert evaluate(frame.drop_duplicates("run"), ["C1"])[0].adapter == "32"


def test_adapter_of_another_kind_has_no_trajectory_and_the_log_says_so(tmp_path, caplog) -> None:
    study = StudyFolder(tmp_path)
    cell = Cell("general-0", "general", "general", None, "shift", "default", 0)
    study.write("one", [cell])
    vector_run(study.run(cell).path, WAYS["general"], kind="mine.Shift")
    frame = measurements(study)
    assert "shift, default world, seed 0" in caplog.text
    assert "holds a mine.Shift" in caplog.text
    assert not (frame["source"] == "rotation").any()
    assert value(frame, "general", "scale_curve", "ce", scale=1.0) == 1.0


def test_what_is_not_there_is_said(tmp_path) -> None:
    study = StudyFolder(tmp_path)
    study.write("empty", [Cell("a", "general", "general", None, "rank1", "default", 0)])
    with pytest.raises(ValueError, match=r"none of the 1 runs of .* is finished"):
        measurements(study)
    with pytest.raises(ValueError, match="there are no measurements at"):
        read_measurements(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("run,value\na,1\n")
    with pytest.raises(ValueError, match=r"has no columns \['arm', 'role'"):
        read_measurements(tmp_path / "other.csv")


def test_records_of_several_settings_are_reported(tmp_path, caplog) -> None:
    run = RunFolder(tmp_path / "run")
    record(run, "own", 1, Point("loss", 1.0, NATS), base="a")
    assert list(run_readings(CELL, run))
    assert "several settings" not in caplog.text
    record(run, "own", 1, Point("loss", 2.0, NATS), base="b")
    assert [each.point.value for each in run_readings(CELL, run)] == [2.0]
    assert "own.jsonl holds records of several settings; those written last at each step count" in caplog.text
