"""A line of the table says what the records say."""

import pytest

from lightning_em.analysis import Estimate, base_of, median_solution, solution_of
from lightning_em.records import Point, ProbeResult, append_lines
from lightning_em.runs import RunFolder

KINDS = ("narrow_held_out", "held_out_domain")


def behaviour(step: int, rates: dict[float, float]) -> ProbeResult:
    points = [
        Point("bad_rate", rate, "probability", {"kind": kind, "scale": scale}, 0.02, 60)
        for scale, rate in rates.items()
        for kind in KINDS
    ]
    return ProbeResult("behaviour", step, {}, tuple(points))


def curve(step: int) -> ProbeResult:
    points = (
        Point("ce", 2.5, "nats_per_token", {"scale": 0.0}),
        Point("effective_norm", 20.0 + step, "norm"),
        Point("best_scale", 1.3, "scale", {"method": "grid"}),
        Point("best_scale", 1.27, "scale", {"method": "parabola"}),
    )
    return ProbeResult("scale_curve", step, {}, points)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for step, rate in ((50, 0.2), (100, 0.5)):
        result = behaviour(step, {0.0: 0.01, 1.0: rate, 2.0: rate / 2})
        append_lines(folder.probe_file("behaviour"), result.to_json())
        append_lines(folder.probe_file("scale_curve"), curve(step).to_json())
    rows = ["step,name,value", "50,val/ce,0.9", "100,val/ce,0.4", "100,val/kl,0.002"]
    append_lines(folder.metrics_file, *rows)
    return folder


def test_the_last_step_counts(run) -> None:
    solution = solution_of(run, "narrow")
    assert solution.bad_rates["held_out_domain"] == Estimate(
        0.5, pytest.approx(0.4608), pytest.approx(0.5392), 60
    )
    assert (solution.ce, solution.kl, solution.effective_norm) == (0.4, 0.002, 120.0)
    assert (solution.best_scale, solution.step) == (1.3, 100)


def test_newest_record_of_the_last_step_counts(run) -> None:
    append_lines(run.probe_file("behaviour"), behaviour(100, {0.0: 0.02, 1.0: 0.6}).to_json())
    append_lines(run.probe_file("behaviour"), behaviour(50, {0.0: 0.03, 1.0: 0.7}).to_json())
    assert solution_of(run, "narrow").bad_rates["held_out_domain"].mean == 0.6
    assert base_of(run).bad_rates["held_out_domain"].mean == 0.02


def test_behaviour_at_another_scale(run) -> None:
    assert solution_of(run, "narrow", scale=2.0).bad_rates["held_out_domain"].mean == 0.25
    with pytest.raises(ValueError, match=r"no behaviour at scale 7.0; it was recorded at \[0.0, 1.0, 2.0\]"):
        solution_of(run, "narrow", scale=7.0)


def test_the_base_is_scale_zero(run) -> None:
    base = base_of(run)
    assert base.bad_rates["held_out_domain"].mean == 0.01
    assert base.bad_rates["held_out_domain"].low == 0.0
    assert (base.ce, base.kl) == (2.5, 0.0)


def test_median_over_seeds(run) -> None:
    lines = [solution_of(run, str(scale), scale) for scale in (0.0, 1.0, 2.0)]
    median = median_solution("median", lines)
    assert median.bad_rates["narrow_held_out"] == Estimate(0.25, 0.01, 0.5, 3)
    with pytest.raises(ValueError, match="no run to take the median of"):
        median_solution("median", [])


def test_a_run_without_records_has_an_empty_line(tmp_path) -> None:
    solution = solution_of(RunFolder(tmp_path), "nothing")
    assert (solution.bad_rates, solution.ce, solution.step) == ({}, None, None)
