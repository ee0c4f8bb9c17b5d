import pytest
from matplotlib.figure import Figure

from lightning_em.analysis import LossCurve
from lightning_em.figures import draw_loss_curves
from tests.recorded import SCALES, parabola

CURVES = {
    "general": [LossCurve(SCALES, parabola(1.0), norm, 4) for norm in (2.0, 3.0)],
    "narrow": [LossCurve(SCALES, parabola(1.5), 2.5, 4)],
}


@pytest.mark.parametrize(("against", "trained_at"), [("scale", [1.0, 1.0]), ("effective_norm", [2.0, 3.0])])
def test_curves_bands_base_and_marks_are_where_the_numbers_are(against, trained_at) -> None:
    axes = Figure().subplots()
    draw_loss_curves(axes, CURVES, against)
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"general", "narrow", "base"}
    assert set(lines["base"].get_ydata()) == {2.0}
    assert lines["general"].get_ydata()[0] == 2.0
    circles = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in circles[:2]] == trained_at
    assert [line.get_ydata()[0] for line in circles[:2]] == [curve.trained_ce for curve in CURVES["general"]]
    stars = [line for line in axes.lines if line.get_marker() == "*"]
    assert [line.get_ydata()[0] for line in stars] == [0.5] * 3
    assert len(axes.collections) == len(CURVES)


def test_axes_have_units() -> None:
    axes = Figure().subplots()
    draw_loss_curves(axes, CURVES, "scale")
    assert axes.get_ylabel() == "training cross-entropy (nats per token)"
    assert axes.get_xlabel().startswith("scale")
