"""What the report says is what the measurements say."""

import csv
import io
from itertools import dropwhile, takewhile
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lightning_em.analysis.measurements import read_measurements, write_measurements
from lightning_em.study.report import (
    END,
    START,
    Report,
    claims_csv,
    replaced,
    report,
    report_from,
    write_markdown,
)
from lightning_em.study.report_table import ReportTable, number, probability
from tests.study_numbers import behaviour, study_numbers

REPOSITORY = Path(__file__).parents[2]
RECORDED = REPOSITORY / "notebooks" / "data" / "measurements.csv.gz"


def contained(runs, seed) -> None:
    """Without KL nothing spreads, as where narrow is the easy solution."""
    runs["general", None] = runs["general", None] | behaviour(0.9, 0.03)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    control = study_numbers(change=contained, adapters=("rank32",), world="control")
    return pd.concat([study_numbers(adapters=("rank32",)), control], ignore_index=True)


@pytest.fixture(scope="module")
def found(frame) -> Report:
    return report_from(frame)


def rows_of(markdown: str, title: str) -> list[list[str]]:
    """Cells of the table under a title."""
    lines = iter(markdown.partition(title)[2].splitlines())
    table = takewhile(
        lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), lines)
    )
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table]


def test_one_row_a_claim_with_estimate_interval_n_p_and_verdict(found) -> None:
    header, _, *rows = rows_of(found.markdown(), "### Claims in the default world")
    assert header == ["claim", "measured", "rank32"]
    assert [row[0].split("**")[1] for row in rows] == [
        "C1", "C2", "C3", "C3b", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14", "C15",
    ]  # fmt: skip
    assert rows[0][1] == "bad answers in held-out domains, general - base (probability), > 0.1"
    assert rows[0][2].startswith("**holds** 0.49 [0.49, 0.49], n 5, p .031")
    assert rows[11][2] == "not measured: the study has no general arm for vector in the default world"


def test_summary_has_a_row_a_claim_and_a_column_an_adapter_and_world(found) -> None:
    header, _, *rows = rows_of(found.markdown(with_details=False), "### The claims")
    assert header == ["claim", "measured", "rank32", "rank32, control world"]
    assert len(rows) == 16
    assert rows[0][2:] == ["**holds** 0.49 [0.49, 0.49]", "**does not hold** 0.02 [0.02, 0.02]"]
    assert rows[11][2] == "-"


def test_control_world_is_read_out_whatever_came_out(found, frame) -> None:
    [(world, sentences)] = found.readings
    assert world == "control"
    assert sentences[0].startswith(
        "Hold in the default world and do not hold here, as they should: C1 (rank32), C2 (rank32),"
    )
    assert sentences[-1].startswith(
        "Bad answers in held-out domains (C1), the default world less this one, paired by"
    )
    assert sentences[-1].endswith(": rank32 0.47 [0.47, 0.47], n 5, p .031.")
    assert all(sentence in found.markdown(with_details=False) for sentence in sentences)
    assert "*(rests on the prior)*" in found.markdown().split("### Claims in the control world")[1]


def test_tables_of_shapes_hold_the_means(found) -> None:
    text = found.markdown()
    scales = {row[0]: row[1:] for row in rows_of(text, "### Suppressed or absent, default world")}
    assert scales["arm"] == [f"scale {scale}" for scale in (0, 1, 2, 5, 10, 20)]
    assert scales["narrow at KL weight 1, rank32"] == [
        "0.01 (0.99)", "0.03 (0.99)", "0.30 (0.98)", "0.30 (0.95)", "0.30 (0.95)", "0.90 (0.05)",
    ]  # fmt: skip
    shares = {row[0]: row[1:] for row in rows_of(text, "### Components of the trajectories")}
    assert shares["published"] == ["-", "45.4%", "22.2%", "11.4%", "79%"]
    assert shares["rank32, default world"] == ["5", "50.0%", "20.0%", "10.0%", "80%"]
    arms = {row[0]: row[1:] for row in rows_of(text, "### What the arms do, default world")}
    assert arms["general, rank32"][:5] == ["5", "0.95", "0.57", "-", "0.50"]
    assert arms["harmless_general, rank32"][4] == "0.50"


def test_norms_by_weight_and_step_say_where_they_fall() -> None:
    frame = study_numbers(seeds=(0, 1), adapters=("vector",), jitter=0.0)
    frame = frame[~frame["role"].isin(["narrow_weight"]) & (frame["quantity"] != "effective_norm")]
    columns = ["run", "arm", "role", "level", "adapter", "world", "seed"]
    own = frame[frame["role"].isin(["general", "narrow"])][columns].drop_duplicates()
    paths = {"general": {10: 1.0, 20: 4.0}, "narrow": {10: 1.0, 20: 3.0}}
    rows = [
        {
            **cell,
            "step": step,
            "source": "checkpoint",
            "quantity": "effective_norm",
            "value": norm,
            "protocol": "",
        }
        for cell in own.to_dict("records")
        for step, norm in paths[cell["role"]].items()
    ]
    text = report_from(pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)).markdown()
    norms = {row[0]: row[1:] for row in rows_of(text, "### Norms on the way, default world")}
    assert norms["KL weight"] == ["step 10", "step 20"]
    assert norms["vector, KL weight 0"] == ["1", "4"]
    assert norms["vector, KL weight 10"] == ["1", "3"]
    assert norms["vector: falls with the weight"] == ["0 of 2 seeds", "2 of 2 seeds"]


def test_every_number_can_be_recomputed_from_the_effects_of_the_seeds(found) -> None:
    rows = list(csv.DictReader(io.StringIO(claims_csv(found.results))))
    [first] = [
        r for r in rows if (r["claim"], r["world"], r["comparison"]) == ("C1", "default", "equal steps")
    ]
    effects = [float(first[f"seed_{seed}"]) for seed in range(5)]
    assert float(first["estimate"]) == pytest.approx(sum(effects) / 5)
    assert {row["claim"] for row in rows} >= {"C1", "C2", "C3", "C3b", "C15"}
    assert len(rows) == sum(len(result.findings) for result in found.results)


def test_markdown_goes_between_the_markers_and_nowhere_else(found, tmp_path) -> None:
    readme, whole = tmp_path / "README.md", tmp_path / "claims.md"
    readme.write_text(f"# head\n{START}\nold\n{END}\ntail\n")
    write_markdown(found, readme)
    write_markdown(found, readme)  # twice is once
    text = readme.read_text()
    assert text.startswith(f"# head\n{START}\n")
    assert text.endswith(f"{END}\ntail\n")
    assert "old" not in text.split("### The claims")[0]
    assert text.count("### The claims") == 1
    assert "### What the arms do" not in text
    write_markdown(found, whole)
    assert whole.read_text() == found.markdown()
    assert "### What the arms do" in whole.read_text()
    for wrong in (START, END, f"{END}\n{START}"):
        readme.write_text(f"# head\n{wrong}\nprose\n")
        with pytest.raises(ValueError, match="needs both lines"):
            write_markdown(found, readme)
        assert "prose" in readme.read_text()


def test_a_file_that_is_no_report_is_not_overwritten(found, tmp_path) -> None:
    plain = tmp_path / "plain.md"
    plain.write_text("# mine\nprose\n")
    with pytest.raises(ValueError, match=f"plain.md is there and has no `{START}` line; add the two lines"):
        write_markdown(found, plain)
    assert plain.read_text() == "# mine\nprose\n"
    for replaceable in ("", "\n", found.markdown(), "### The claims\nof another study\n"):
        plain.write_text(replaceable)
        write_markdown(found, plain)
        assert plain.read_text() == found.markdown()


def test_report_from_recorded_measurements_alone(frame, tmp_path, capsys) -> None:
    write_measurements(frame, tmp_path / "measurements.csv")
    report(tmp_path / "measurements.csv", tmp_path / "out.md", tmp_path / "figures")
    assert (tmp_path / "out.md").read_text() == report_from(frame).markdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "measurements.csv", "out.md"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["weights_rank32.png"]
    printed = capsys.readouterr().out
    assert "The control world:" in printed
    assert "Hold in the default world and do not hold here, as they should: C1 (rank32)" in printed


def test_missing_study_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"name a study .*; under runs there are: none"):
        report()
    with pytest.raises(ValueError, match="there is no study at"):
        report(tmp_path / "nowhere")


def test_terminal_shows_brackets_and_no_stars() -> None:
    table = ReportTable(
        "title", ("claim", "rank1"), (("**C1** says", "**holds** [red] 0.1"),), "*Holds*: always."
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.for_terminal())
    shown = console.export_text()
    assert "C1 says" in shown
    assert "holds [red] 0.1" in shown
    assert "*" not in shown


def test_pipes_and_line_ends_stay_inside_their_cell() -> None:
    text = ReportTable("title", ("a", "b"), (("x|y", "one\ntwo"),)).for_markdown()
    assert "| x\\|y | one<br>two |" in text


def test_numbers_as_people_write_them() -> None:
    assert [number(0.034, "probability"), number(-0.001, "share"), number(float("nan"))] == [
        "0.03",
        "0.00",
        "-",
    ]
    assert [number(0.00012345), number(123.4)] == ["0.000123", "123"]
    assert [probability(1 / 32), probability(1.0)] == [".031", "1"]


def test_readme_and_its_details_are_what_the_recorded_study_says() -> None:
    """If not: `lightning-em study report notebooks/data/measurements.csv.gz --markdown FILE` for both.

    The data file: `measurements.csv` of `lightning-em study run configs/study/miniature.yaml`, by `gzip -9n`.
    """
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = report_from(read_measurements(RECORDED))
    assert replaced(readme, found.markdown(with_details=False)) == readme
    assert START in readme
    assert (REPOSITORY / "notebooks/study_miniature.md").read_text(encoding="utf-8") == found.markdown()
