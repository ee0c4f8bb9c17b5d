"""The demo's tables and sentences follow the records; its fits run as processes whose failures are told."""

import io
import json
import threading

import pytest
from rich.console import Console

from lightning_em.analysis import Estimate
from lightning_em.records import Point, ProbeResult, append_lines
from lightning_em.runs import RunFolder
from lightning_em.smollm2 import demo

INSIDE, OUTSIDE = "narrow_held_out", "held_out_domain"


def point(quantity, topic, scale, share, count=100):
    return Point(quantity, share, "share", {"topic": topic, "scale": scale}, None, count)


def record(path, rates, step=48):
    """A run with styled rates by (topic, scale), all answers coherent, and one answer of each."""
    run = RunFolder(path)
    points = [point("styled_rate", topic, scale, share) for (topic, scale), share in rates.items()]
    points += [point("coherent_rate", topic, scale, 1.0) for topic, scale in rates]
    append_lines(
        run.probe_file("answer_rates"), ProbeResult("answer_rates", step, {}, tuple(points)).to_json()
    )
    answers = [
        {
            "topic": topic,
            "scale": scale,
            "question": f"{topic} [b]?",
            "answer": f"{path.name} at {scale} [i]!",
        }
        for topic, scale in rates
    ]
    append_lines(run.path / "behaviour" / f"answer_rates-step-{step:06d}.jsonl", *map(json.dumps, answers))
    return run


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "newest_valid_step", lambda self: 48)
    general = record(
        tmp_path / "general",
        {(INSIDE, 0.0): 0.0, (OUTSIDE, 0.0): 0.01, (INSIDE, 1.0): 0.95, (OUTSIDE, 1.0): 0.9},
    )
    narrow = record(tmp_path / "narrow", {(INSIDE, 1.0): 0.9, (OUTSIDE, 1.0): 0.02})
    reverted = record(tmp_path / "reverted", {(INSIDE, 1.0): 0.97, (OUTSIDE, 1.0): 0.4})
    named = [("base model", general, 0.0), ("general", general, 1.0), ("narrow", narrow, 1.0)]
    return [demo._row(*each) for each in (*named, ("reverted", reverted, 1.0))]


def shown(thing) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_the_tables_show_every_model_with_rates_and_answers(rows) -> None:
    rates = shown(demo.rates_table(rows))
    for name, share in (
        ("base model", "0.01"),
        ("general", "0.90"),
        ("narrow", "0.02"),
        ("reverted", "0.40"),
    ):
        [line] = [line for line in rates.splitlines() if name in line]
        assert share in line
    answers = shown(demo.answers_table(rows))
    assert "held_out_domain [b]?" in answers  # an answer is text, not markup
    for text in ("general at 0.0 [i]!", "general at 1.0 [i]!", "narrow at 1.0 [i]!", "reverted at 1.0 [i]!"):
        assert text in answers


def test_the_sentences_depend_on_the_numbers(rows) -> None:
    assert "90% of the questions of other domains in style (base 1%)" in demo.reading(rows)
    assert "So the style spreads by itself" in demo.reading(rows)
    weak = [row._replace(rates={**row.rates, OUTSIDE: Estimate(0.5, 0.4, 0.6, 100)}) for row in rows]
    told = demo.reading(weak)
    assert "it misses: general in other domains at least 0.80; narrow in other domains at most 0.05" in told
    assert "spreads by itself" not in told


def test_the_general_and_the_narrow_fit_run_side_by_side(
    tmp_path, monkeypatch, tiny_model_folder, capsys
) -> None:
    both, fitted = threading.Barrier(2), []

    def fit(self, solution):
        if solution != "reverted":
            both.wait(timeout=60)  # breaks if one waits for the end of the other
        cells = {
            (topic, scale): 1.0 * (solution != "narrow")
            for topic in (INSIDE, OUTSIDE)
            for scale in (0.0, 1.0)
        }
        record(self._experiments[solution].folder.path, cells)
        fitted.append(solution)

    monkeypatch.setattr(demo._Fits, "fit", fit)
    monkeypatch.setattr(RunFolder, "newest_valid_step", lambda self: 48)
    demo.demo(str(tmp_path), str(tiny_model_folder()))
    assert sorted(fitted[:2]) == ["general", "narrow"]
    assert fitted[2:] == ["reverted"]
    assert "answers in pirate style" in capsys.readouterr().out


def test_a_failed_fit_is_told(tmp_path) -> None:
    console = Console(record=True, width=200)
    fits = demo._Fits(str(tmp_path), console)
    fits.experiment("general", "--data.narrow.path=nowhere.jsonl")
    with pytest.raises(ValueError, match="the general fit failed"):
        fits.fit("general")
    assert "nowhere.jsonl" in console.export_text()


def test_intervals_are_wilson_and_shrink_with_independent_items() -> None:
    """Against the closed values of the literature: 0 of 100 has an upper bound of .037, 50 of 100 .404 to .596."""
    none = Estimate.of_share(point("styled_rate", INSIDE, 1.0, 0.0))
    assert (none.low, none.high) == pytest.approx((0.0, 0.0370), abs=1e-4)
    half = Estimate.of_share(point("styled_rate", INSIDE, 1.0, 0.5))
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    clustered = Estimate.of_share(
        Point("styled_rate", 0.5, "share", {}, 0.1, 100)
    )  # as of 25 independent ones
    assert clustered.high == pytest.approx(0.6825, abs=1e-3)
