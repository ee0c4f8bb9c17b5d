import pytest
from matplotlib.figure import Figure

from lightning_em.analysis.claims import Evidence
from lightning_em.figures import COLOURS, draw_weights
from lightning_em.figures.weights import draw_rates, draw_scales
from tests.study_numbers import preferred, study_numbers


@pytest.fixture(scope="module")
def frame():
    return study_numbers(seeds=(0, 1), adapters=("rank32",), jitter=0.0)


def arms_of(evidence):
    return sorted(evidence.arms("general", "narrow", "narrow_weight"), key=lambda arm: arm.level or 0.0)


def test_rates_stand_at_their_weights(frame) -> None:
    evidence, axes = Evidence(frame, "rank32", "default"), Figure().subplots()
    draw_rates(axes, evidence, arms_of(evidence))
    seen, held_out = axes.lines
    assert list(seen.get_xdata()) == [0, 0.1, 1, 10, 100]
    assert list(seen.get_ydata()) == [0.95, 0.9, 0.9, 0.9, 0.9]
    assert list(held_out.get_ydata()) == [0.5, 0.3, 0.03, 0.02, 0.01]


def test_scales_are_hollow_where_answers_fall_apart(frame) -> None:
    evidence, axes = Evidence(frame, "rank32", "default"), Figure().subplots()
    draw_scales(axes, evidence, arms_of(evidence))
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["0", "0.1", "1", "10", "100"]
    assert list(lines["1"].get_xdata()) == [1, 2, 5, 10, 20]
    assert list(lines["1"].get_ydata()) == [0.03, 0.3, 0.3, 0.3, 0.9]
    hollow = [line.get_xdata()[0] for line in axes.lines if str(line.get_markerfacecolor()) == "white"]
    assert hollow == [20.0] * 5


def test_preference_has_no_hollow_marks_and_says_so(frame, tmp_path) -> None:
    evidence, axes = Evidence(preferred(frame), "rank32", "default"), Figure().subplots()
    draw_scales(axes, evidence, arms_of(evidence))
    assert "white" not in {str(line.get_markerfacecolor()) for line in axes.lines}
    assert axes.get_xlabel().endswith("no answers were judged: coherence is unknown")
    assert axes.get_ylabel() == "share with the bad answer likelier, held-out domains"
    assert draw_weights(preferred(frame), tmp_path / "weights.png", "rank32").is_file()


def test_neither_answers_nor_preference_is_one_line(frame, tmp_path) -> None:
    bare = frame[frame["source"] != "behaviour"]
    with pytest.raises(
        ValueError, match=r"of rank32 needs what is not recorded: general-.* no behaviour/bad_rate"
    ):
        draw_weights(bare, tmp_path / "x.png", "rank32")


def test_kinds_of_question_have_not_the_colours_of_solutions(frame) -> None:
    evidence, axes = Evidence(frame, "rank32", "default"), Figure().subplots()
    draw_rates(axes, evidence, arms_of(evidence))
    assert not {line.get_color() for line in axes.lines} & set(COLOURS.values())
    assert [line.get_label() for line in axes.lines] == [
        "new narrow questions about trained words", "held-out domains",
    ]  # fmt: skip


def test_figure_is_written_and_what_is_missing_is_named(frame, tmp_path) -> None:
    assert draw_weights(frame, tmp_path / "new" / "weights.png", "rank32").stat().st_size > 10_000
    general = frame[frame["role"] == "general"]
    with pytest.raises(ValueError, match="needs a general and a narrow arm of rank32"):
        draw_weights(general, tmp_path / "x.png", "rank32")
