"""Execute notebooks into the .ipynb next to the source: `python notebooks/execute.py [NAME.py ...]`; default all."""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent


def execute(source: Path) -> Path:
    """Run a notebook in a new kernel. The file depends on source and outputs only, not on times or random cell ids."""
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
