"""Report of a study: verdicts on the claims, for the terminal and for a README."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console

from lightning_em.analysis.cells import DEFAULT_WORLD, StudyFolder
from lightning_em.analysis.claims import ClaimResult
from lightning_em.analysis.claims.evidence import evidence_of
from lightning_em.analysis.claims.results import results_of
from lightning_em.analysis.measurements import measurements, read_measurements, write_measurements
from lightning_em.manifest import write_atomically
from lightning_em.study.claim_tables import (
    MINIATURE,
    comparison_table,
    control_reading,
    limits_table,
    summary_table,
    verdict_table,
)
from lightning_em.study.plan import read_study
from lightning_em.study.report_table import ReportTable
from lightning_em.study.shape_tables import (
    arms_table,
    components_table,
    norms_table,
    scales_table,
    trajectory_table,
)

MOST_NAMED = 20
START, END = "<!-- study report -->", "<!-- end -->"


@dataclass(frozen=True)
class Report:
    """Results and tables of a study.

    Attributes:
        results: Result of every claim in every comparison.
        tables: Tables, in reading order.
        readings: Sentences on each world besides the default one, where the planted prior is weaker.
        is_miniature: Whether the study was run in the miniature.
    """

    results: tuple[ClaimResult, ...]
    tables: tuple[ReportTable, ...]
    readings: tuple[tuple[str, tuple[str, ...]], ...]
    is_miniature: bool

    def markdown(self, with_details: bool = True) -> str:
        """The tables and sentences as Markdown."""
        lines = [f"{MINIATURE}\n\n"] if self.is_miniature else []
        first, *others = self.tables
        lines.append(first.for_markdown())
        for world, sentences in self.readings:
            lines.append(
                f"**The {world} world**\n\n" + "".join(f"- {sentence}\n" for sentence in sentences) + "\n"
            )
        lines += [table.for_markdown() for table in others if with_details or not table.is_detail]
        return "".join(lines)

    def print(self, console: Console) -> None:
        """Print the tables that are not details, and the sentences."""
        for table in self.tables:
            if not table.is_detail:
                console.print(table.for_terminal())
        for world, sentences in self.readings:
            console.print(f"The {world} world:", *sentences, sep="\n", markup=False)


def report(
    study: str | Path | None = None,
    markdown: str | Path | None = None,
    figures: str | Path | None = None,
    root: str | Path | None = None,
) -> None:
    """Evaluate the claims of a study from its runs, print the verdicts, and write the results into its root.

    `measurements.csv` holds every number, `claims.csv` every criterion with its effect in each seed, and `report.md`
    every table. These files are not written when the input is a recorded `measurements.csv`. A finished run that
    differs from the study's plan is left out, and its name is printed.

    Args:
        study: Study file, root of the runs, or a recorded `measurements.csv` (also `.csv.gz`); the only study
            under `runs` if not given.
        markdown: File to write the report to as well. In a file with the lines `<!-- study report -->` and
            `<!-- end -->`, the text between them is replaced and details are left out; otherwise the file holds
            the whole report.
        figures: Folder for the figures of the KL weight's effect, `weights_<adapter>.png`; none if not given.
        root: Folder of the runs if `study` is a study file; `runs/study-<name>` if not given.

    Raises:
        ValueError: If there is no such study, or none of its runs is finished.
    """
    path, console = Path(study) if study is not None else _only_study(), Console()
    if root is not None and path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--root goes with the file of a study, got {path}: leave it out, or name the file.")
    written = [] if markdown is None else [Path(markdown)]
    if path.name.endswith((".csv", ".csv.gz")):
        frame = read_measurements(path)
        found = report_from(frame)
    else:
        folder = StudyFolder(read_study(path, root).root if path.suffix in (".yaml", ".yml") else path)
        _name_left_out(folder, console)
        frame = measurements(folder)
        write_measurements(frame, folder.measurements_file)
        found = report_from(frame)
        write_atomically(folder.root / "claims.csv", claims_csv(found.results))
        written.append(folder.root / "report.md")
    found.print(Console(width=max(console.width, 150)))
    for file in written:
        write_markdown(found, file)
        console.print(f"written: {file}")
    if figures is not None:
        from lightning_em.figures import draw_weights  # matplotlib is an extra

        for adapter in dict.fromkeys(
            result.adapter for result in found.results if result.world == DEFAULT_WORLD
        ):
            drawn = draw_weights(frame, Path(figures) / f"weights_{adapter}.png", adapter)
            console.print(f"written: {drawn}")


def report_from(frame: pd.DataFrame) -> Report:
    """Make the report of a study from its measurements alone."""
    evidence = evidence_of(frame)
    results = results_of(evidence)
    worlds = list(dict.fromkeys(result.world for result in results))
    others = [world for world in worlds if world != DEFAULT_WORLD]
    tables = [summary_table(results), *(verdict_table(results, world) for world in worlds)]
    for world in worlds:
        tables += [
            comparison_table(results, world),
            arms_table(evidence, world),
            scales_table(evidence, world),
            norms_table(evidence, world),
            trajectory_table(evidence, world),
        ]
    is_miniature = bool((frame["source"] == "behaviour").any())
    tables += [components_table(evidence), *([limits_table()] if is_miniature else [])]
    readings = tuple((world, tuple(control_reading(results, world))) for world in others)
    return Report(tuple(results), tuple(tables), readings, is_miniature)


def write_markdown(found: Report, path: Path) -> None:
    """Write the report between the markers of a file without details, or the whole report as a file.

    Raises:
        ValueError: If an existing file has only one marker, has them in the wrong order, or has none and is not an
            earlier report.
    """
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if (START in before or END in before) and END not in before.partition(START)[2]:
        raise ValueError(f"{path} needs both lines, {START} and then {END}, or neither.")
    is_part, is_report = START in before, f"### {found.tables[0].title}" in before.splitlines()[:3]
    if before.strip() and not is_part and not is_report:
        raise ValueError(
            f"{path} is there and has no `{START}` line; add the two lines {START} and {END} where the tables "
            "belong, or name a new file."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = found.markdown(with_details=not is_part)
    write_atomically(path, replaced(before, text) if is_part else text)


def replaced(document: str, text: str) -> str:
    """Replace the text between the markers of a document."""
    head, _, rest = document.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{text}{END}{tail}"


def claims_csv(results: Sequence[ClaimResult]) -> str:
    """CSV of every criterion of every comparison, with its effect in every seed."""
    seeds = sorted({seed for r in results for f in r.findings for seed in f.values})
    columns = ("words", "unit", "rule", "estimate", "low", "high", "n", "p", "p_against", "verdict", "note")
    place = ("claim", "adapter", "world", "comparison", "decides")
    rows = [
        [getattr(result, key) for key in place]
        + [getattr(finding, key) for key in columns]
        + [finding.values.get(seed, "") for seed in seeds]
        for result in results
        for finding in result.findings
    ]
    frame = pd.DataFrame(rows, columns=[*place, *columns, *(f"seed_{seed}" for seed in seeds)], dtype=object)
    return frame.to_csv(index=False, na_rep="nan", lineterminator="\n")


def _name_left_out(folder: StudyFolder, console: Console) -> None:
    reasons = list(folder.left_out().items())
    for run, reason in reasons[:MOST_NAMED]:
        console.print(f"left out: {run}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if len(reasons) > MOST_NAMED:
        console.print(f"left out: {len(reasons) - MOST_NAMED} more; `lightning-em study status` tells which")


def _only_study() -> Path:
    found = sorted(file.parent for file in Path("runs").glob("*/study.json"))
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ValueError(f"name a study (its file or its folder); under runs there are: {names}.")
    return found[0]
