"""The verbs beside LightningCLI's: probe, runs, miniature, data. Heavy imports are inside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from lightning_em.runs import RunFolder, locate, step_of

console = Console()


def probe(words: list[str]) -> int:
    """Measure what is not on record yet, at every checkpoint of a run."""
    return _call(probe_run, words)


def probe_run(run: str, config: str | None = None, num_examples: int = 64, batch_size: int = 16) -> None:
    """Run probes on the checkpoints of a run; what is on record already is left alone.

    Args:
        run: `runs/x` for every checkpoint, `runs/x@step-40` for one.
        config: YAML with `probes:`, as under `probing` in an experiment; the run's own if not given.
        num_examples: Training rows of each stream to measure on, with `config`.
        batch_size: Rows in one forward pass, with `config`.
    """
    from rich.progress import track

    from lightning_em.cli import load_probing, load_run

    loaded = load_run(run)
    probing = load_probing(loaded.folder, config, num_examples, batch_size)
    steps = [loaded.step] if "@" in run else loaded.folder.steps()
    device_model = loaded.module.model
    measured = 0
    for step in track(steps, description=f"probing {loaded.folder.path.name}", console=console):
        _, checkpoint = locate(f"{loaded.folder.path}@step-{step}")
        device_model.adapter.load(checkpoint)
        measured += probing.measure(loaded.folder, device_model, loaded.data, step)
    console.print(f"{measured} new records in {loaded.folder.path / 'probes'}; {len(steps)} checkpoints.")


def runs(words: list[str]) -> int:
    """List runs, or show one."""
    return _call({"ls": list_runs, "show": show_run}, words)


def list_runs(root: str = "runs") -> None:
    """List the runs under a folder with their state.

    Args:
        root: Folder of the runs.
    """
    folders = [RunFolder(file.parent) for file in sorted(Path(root).glob("*/run.json"))]
    if not folders:
        raise ValueError(f"there is no run under {root!r}; fit one, or give another --root.")
    table = Table("run", "status", "last checkpoint", "attempts", title=f"runs in {root}")
    for folder in folders:
        record, steps = folder.read_run(), folder.steps()
        last = f"step {steps[-1]} of {record.get('max_steps')}" if steps else "none"
        table.add_row(folder.path.name, str(record.get("status")), last, str(len(record.get("attempts", []))))
    console.print(table)


def show_run(run: str) -> None:
    """Show where a run stands: status, versions, last metrics and records.

    Args:
        run: The run's folder.
    """
    from lightning_em.callbacks.metrics import read_metrics

    folder, checkpoint = locate(run)
    record = folder.read_run()
    table = Table("what", "value", title=str(folder.path), show_header=False)
    for key in ("status", "exit_reason", "base", "identity", "last_step"):
        table.add_row(key, str(record.get(key)))
    table.add_row("newest valid checkpoint", f"step {step_of(checkpoint)}")
    metrics = read_metrics(folder.metrics_file)
    for name in sorted({name for values in metrics.values() for name in values}):
        step = max(step for step, values in metrics.items() if name in values)
        table.add_row(f"{name} at step {step}", f"{metrics[step][name]:.6g}")
    for result in folder.probe_results():
        table.add_row(f"probe {result.probe}", f"step {result.step}, {len(result.points)} points")
    console.print(table)


def _call(function: Callable[..., None] | dict[str, Any], words: list[str]) -> int:
    auto_cli(function, args=words, as_positional=True)
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {"probe": probe, "runs": runs}
