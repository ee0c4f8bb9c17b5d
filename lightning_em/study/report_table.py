"""Tables for a terminal or a README, and the format of their numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

TWO_DECIMALS = ("probability", "share", "cosine", "correlation")
NOTHING = "-"


@dataclass(frozen=True)
class ReportTable:
    """A table of strings.

    Attributes:
        title: Title of the table.
        columns: Names of the columns; the first column holds names, the others numbers or text.
        rows: Rows, each with one string per column.
        caption: Explanation of how to read the table.
        is_detail: Whether only the full report holds the table, not a README or the terminal.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    is_detail: bool = False

    def for_terminal(self) -> Table:
        """The table for rich."""
        table = Table(
            title=self.title,
            caption=Text(self.caption.replace("*", "")),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            show_lines=True,
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, overflow="fold", ratio=2 if number == 0 else None)
        for row in self.rows:
            # `Text`, since rich would read brackets in a string as markup.
            table.add_row(*(Text(cell.replace("*", "")) for cell in row))
        return table

    def for_markdown(self) -> str:
        """The table as Markdown, with a blank line at its end."""
        lines = [_line(self.columns), "|" + "---|" * len(self.columns), *map(_line, self.rows)]
        table = "\n".join(lines)
        return f"### {self.title}\n{self.caption}\n\n{table}\n\n"


def number(value: float, unit: str = "") -> str:
    """Format a value: two decimals for units such as probabilities, else three digits; a dash for NaN."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:.2f}" if unit in TWO_DECIMALS else f"{value:.3g}"
    return text.removeprefix("-") if float(text) == 0 else text


def probability(p: float) -> str:
    """Format a p value with three decimals and no leading zero, as in `.031`."""
    return f"{p:.3f}".removeprefix("0") if p < 1 else "1"


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _line(cells: Sequence[str]) -> str:
    texts = (cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells)
    return "| " + " | ".join(texts) + " |"
