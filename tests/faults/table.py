"""pytest plugin for `make faults`: one line per guarantee, on the terminal and as Markdown.

python -m pytest -p tests.faults.table -m fault
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TARGET = Path(os.environ.get("FAULT_TABLE", "fault_table.md"))
# Guarantees that are tested elsewhere, with the data code.
ELSEWHERE = {
    "tests/data/test_chat.py::": (
        "F17",
        "the mask equals the hand-made one for every template; none is an error",
    ),
    "tests/data/test_rows.py::": ("F18", "each malformed line: file:line and reason"),
    "tests/test_distributed.py::": (
        "F34",
        "loss of each step within 1e-5 for 1 and 2 ranks, accumulation 1 and 4",
    ),
}
_results: dict[str, dict[str, Any]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for prefix, (name, criterion) in ELSEWHERE.items():
            if item.nodeid.startswith(prefix):
                item.add_marker(pytest.mark.fault(name, criterion))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    marker = item.get_closest_marker("fault")
    if marker is not None and (report.when == "call" or not report.passed):
        name, criterion = marker.args
        entry = _results.setdefault(
            name, {"criteria": [], "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
        )
        if criterion not in entry["criteria"]:
            entry["criteria"].append(criterion)
        entry[report.outcome] += 1
        entry["seconds"] += report.duration
    return report


def _rows() -> Iterator[tuple[str, str, str, str]]:
    for name in sorted(_results, key=lambda text: int(text.removeprefix("F"))):
        entry = _results[name]
        parts = [f"{entry[kind]} {kind}" for kind in ("failed", "skipped") if entry[kind]]
        word = "holds" if not parts else ", ".join(parts)
        yield (
            name,
            "; ".join(entry["criteria"]),
            f"{word} ({entry['passed']} tests)",
            f"{entry['seconds']:.0f} s",
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = list(_rows())
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "criterion", "result", "time", title="fault tests")
    for row in rows:
        table.add_row(*row)
    Console(file=terminalreporter._tw._file, width=150).print(table)
    lines = [
        "| | criterion | result | time |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
