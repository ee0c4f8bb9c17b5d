"""A table that can be printed on a terminal or written into a README, and how its numbers look."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

TWO_DECIMALS = ("probability", "share", "cosine", "correlation")
NOTHING = "-"


@dataclass(frozen=True)
class Sheet:
    """A table of texts.

    Attributes:
        title: Above it.
        columns: Their names; the first holds names, the others numbers or words.
        rows: One text a column.
        caption: Below it: how to read it.
        is_detail: Neither a README nor the terminal shows it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    is_detail: bool = False

    def for_terminal(self) -> Table:
        """The same for rich."""
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
            table.add_row(*(Text(cell.replace("*", "")) for cell in row))  # a Text: brackets are no markup
        return table

    def for_markdown(self) -> str:
        """The same in Markdown, ended by an empty line."""
        lines = [_line(self.columns), "|" + "---|" * len(self.columns), *map(_line, self.rows)]
        table = "\n".join(lines)
        return f"### {self.title}\n{self.caption}\n\n{table}\n\n"


def number(value: float, unit: str = "") -> str:
    """A value with as many digits as its unit bears; a dash for none."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:.2f}" if unit in TWO_DECIMALS else f"{value:.3g}"
    return text.removeprefix("-") if float(text) == 0 else text


def probability(p: float) -> str:
    """A p as journals write it."""
    return f"{p:.3f}".removeprefix("0") if p < 1 else "1"


def mean(values: Sequence[float]) -> float:
    """Mean of what there is; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _line(cells: Sequence[str]) -> str:
    texts = (cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells)
    return "| " + " | ".join(texts) + " |"
