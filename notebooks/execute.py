"""Execute notebooks into the .ipynb beside them: `python notebooks/execute.py [NAME.py ...]`, all if none is named."""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent


def execute(source: Path) -> Path:
    """Run a notebook in a kernel of its own; the file depends on sources and outputs alone, not on the day."""
    notebook = jupytext.read(source)
    NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": FOLDER}},
    ).execute()
    for number, cell in enumerate(notebook.cells, start=1):
        cell["id"] = f"cell-{number}"
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


if __name__ == "__main__":
    for source in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("[0-9]*.py")):
        try:
            print(f"{source} -> {execute(source)}")
        except CellExecutionError as error:
            raise SystemExit(f"{source}: {error.ename}: {error.evalue}\n{error.traceback}") from None
