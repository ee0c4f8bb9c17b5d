import logging
import math

import numpy as np
import pytest

from lightning_em.analysis import (
    LossCurve,
    at_equal_norm,
    common_grid,
    loss_curve,
    records_frame,
    runs_by_base,
    sign_test,
)
from lightning_em.records import Point, ProbeResult
from lightning_em.runs import RunFolder
from tests.recorded import SCALES, parabola, record_run, scale_curve


def curve(lowest_at: float, norm: float) -> LossCurve:
    return LossCurve(SCALES, parabola(lowest_at), norm, 4)


def test_curve_is_that_of_the_last_step_and_its_last_measurement(tmp_path) -> None:
    records = [
        scale_curve(parabola(1.0), 3.0, step=2),
        scale_curve(parabola(1.5), 5.0, step=4),
        scale_curve(parabola(2.0), 5.0, step=4),
    ]
    frame = records_frame(record_run(tmp_path, "base", *records))
    assert loss_curve(frame) == LossCurve(SCALES, parabola(2.0), 5.0, 4)
    assert loss_curve(frame, step=2) == LossCurve(SCALES, parabola(1.0), 3.0, 2)


def test_missing_curve_or_norm_is_named(tmp_path) -> None:
    frame = records_frame(record_run(tmp_path / "a", "base", scale_curve(parabola(1.0), 3.0)))
    with pytest.raises(ValueError, match=r"no scale curve at step 3; steps with one: \[4\]"):
        loss_curve(frame, step=3)
    bare = ProbeResult("scale_curve", 4, {}, (Point("ce", 1.0, "nats_per_token", {"scale": 1.0}),))
    with pytest.raises(ValueError, match="no effective norm"):
        loss_curve(records_frame(record_run(tmp_path / "b", "base", bare)))


def test_base_trained_and_best_are_read_off_the_curve() -> None:
    found = curve(lowest_at=1.5, norm=2.0)
    assert (found.base_ce, found.best_scale, found.best_ce) == (2.0, 1.5, 0.5)
    assert found.trained_ce == pytest.approx(0.5 + 1.5 / 9)
    assert found.efficiency == pytest.approx((2.0 - found.trained_ce) / 4)
    assert found.norms == (0.0, 1.0, 2.0, 3.0, 4.0)


def test_loss_at_a_norm_is_the_measured_one_and_linear_between() -> None:
    found = curve(1.0, norm=2.0)
    assert [found.ce_at_norm(norm) for norm in found.norms] == list(found.ce)
    assert found.ce_at_norm(0.5) == pytest.approx((found.ce[0] + found.ce[1]) / 2)
    with pytest.raises(ValueError, match="measured at norms 0 to 4"):
        found.ce_at_norm(4.1)


def test_equal_norm_is_the_smaller_trained_one() -> None:
    general, narrow = curve(1.0, norm=2.0), curve(1.0, norm=4.0)
    assert at_equal_norm(general, narrow) == (2.0, general.trained_ce, narrow.ce[1])
    assert at_equal_norm(narrow, general).norm == 2.0


@pytest.mark.parametrize(("against", "end"), [("scale", 2.0), ("effective_norm", 4.0)])
def test_common_grid_ends_where_the_shortest_curve_ends(against, end) -> None:
    grid, losses = common_grid([curve(1.0, 2.0), curve(1.5, 3.0)], against, num_points=5)
    assert list(grid) == list(np.linspace(0, end, 5))
    assert list(losses[0]) == list(parabola(1.0))
    assert losses.shape == (2, 5)


def test_sign_test_matches_the_binomial_law() -> None:
    assert sign_test(5, 5) == 1 / 32
    assert sign_test(0, 5) == 1.0
    assert sign_test(4, 5) == pytest.approx((math.comb(5, 4) + 1) / 32)


def test_runs_are_the_newest_finished_ones_of_each_base(tmp_path, caplog) -> None:
    line = scale_curve(parabola(1.0), 2.0)
    record_run(tmp_path / "x-aaaaaaaa", "world/seed-0", line, ended="2030-01-01")
    newer = record_run(tmp_path / "x-bbbbbbbb", "world/seed-0", line, ended="2030-01-02")
    other = record_run(tmp_path / "x-cccccccc", "world/seed-1", line)
    record_run(tmp_path / "x-dddddddd", "world/seed-2", line, status="running")
    RunFolder(tmp_path / "x-99999999").update_run(status="queued")  # its config comes with its job
    record_run(tmp_path / "x-eeeeeeee", "control/seed-0", line)
    record_run(tmp_path / "xy-ffffffff", "world/seed-3", line)
    with caplog.at_level(logging.WARNING):
        found = runs_by_base(tmp_path, "x", base="world/*")
    assert {base: run.path for base, run in found.items()} == {
        "world/seed-0": newer.path,
        "world/seed-1": other.path,
    }
    assert "x-aaaaaaaa is ignored in favor of the newer" in caplog.text
    assert runs_by_base(tmp_path / "none", "x") == {}
