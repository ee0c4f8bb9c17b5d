"""Notebooks run, say what the numbers say, and their two files hold the same cells."""

import re
import runpy
from pathlib import Path

import jupytext
import matplotlib as mpl
import nbformat
import pytest
from matplotlib import pyplot as plt

from tests.recorded import parabola, record_run, scale_curve

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted((REPOSITORY / "notebooks").glob("[0-9]*.py"))
LOSS_AGAINST_SCALE = REPOSITORY / "notebooks" / "01_loss_against_scale.py"


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    mpl.use("agg")
    yield
    plt.close("all")


def record_worlds(root: Path, general_norms: list[float], narrow_norms: list[float]) -> None:
    """A run of each solution in each world; losses are the same function of the scale."""
    for solution, norms in {"general": general_norms, "narrow": narrow_norms}.items():
        for seed, norm in enumerate(norms):
            name = f"miniature_{solution}_rank32-{seed:08x}"
            lowest_at = 1.5 if solution == "narrow" else 1.0
            record_run(root / name, f"miniature://seed-{seed}/model", scale_curve(parabola(lowest_at), norm))


def test_there_are_notebooks() -> None:
    assert SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pair_is_in_step(source) -> None:
    """If not: `make notebooks`."""
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in executed.cells] == cells


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_and_small(source) -> None:
    file = source.with_suffix(".ipynb")
    outputs = [
        output for cell in nbformat.read(file, as_version=4).cells for output in cell.get("outputs", ())
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert file.stat().st_size < 500_000


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_has_no_magic_and_defines_nothing(source) -> None:
    text = source.read_text(encoding="utf-8")
    assert text.isascii()
    assert not re.search(r"^(%|!|def |class )", text, flags=re.MULTILINE)


def test_finding_says_what_the_numbers_say(tmp_path, monkeypatch, capsys) -> None:
    record_worlds(tmp_path / "runs", [2.0] * 5, [4.0] * 5)
    monkeypatch.chdir(tmp_path)
    variables = runpy.run_path(str(LOSS_AGAINST_SCALE))
    finding = capsys.readouterr().out.splitlines()[-1]
    assert "smaller of their trained norms (mean 2.0)" in finding
    # narrow at half its scale: 0.5 + 1.5 * (0.5 / 1.5 - 1)^2
    assert "training CE of 0.500 and the narrow one of 1.167 nats per token" in finding
    assert "lower in 5 of 5 worlds (one-sided sign test p = 0.031, general is more efficient)" in finding
    assert "larger scale in 5 of 5" in finding
    assert variables["by_norm"].get_xlabel() == "effective norm of the update"
    assert variables["by_norm"].get_ylabel().endswith("(nats per token)")


def test_finding_is_undecided_where_the_worlds_disagree(tmp_path, monkeypatch, capsys) -> None:
    record_worlds(tmp_path / "runs", [2.0, 8.0], [4.0, 2.0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(LOSS_AGAINST_SCALE))
    assert "lower in 1 of 2 worlds (one-sided sign test p = 0.750, undecided)" in capsys.readouterr().out


def test_without_runs_it_says_which_commands_make_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(LOSS_AGAINST_SCALE))
    named = re.findall(r"lightning-em fit --config (\S+)", str(stopped.value))
    assert len(named) == 2
    assert all((REPOSITORY / file).is_file() for file in named)
