"""Subcommands for existing runs: `probe`, `runs ls` and `runs show`."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_em.cluster.queue import described, job_of, job_states, status_in_queue
from lightning_em.records import read_metrics
from lightning_em.runs import RunFolder, locate, step_of
from lightning_em.subcommands.wiring import add_subcommand, console


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    probing = add_subcommand(
        subcommands, "probe", probe_run, "measure what is not on record yet, at every checkpoint of a run"
    )
    probing.add_argument("run", help="runs/x for every checkpoint, runs/x@step-40 for one")
    probing.add_argument(
        "--config", help="YAML with `probes:`, e.g. configs/probing/curves.yaml; default: the run's"
    )
    probing.add_argument(
        "--num_examples", type=int, help="training rows of each stream, whatever the YAML says"
    )
    probing.add_argument("--batch_size", type=int, help="rows in one forward pass, whatever the YAML says")
    probing.add_argument("--allow_zero_adapter", action="store_true", help="also one that changes no logit")
    runs = subcommands.add_parser("runs", help="list runs, or show one").add_subparsers(required=True)
    listing = add_subcommand(runs, "ls", list_runs, "list runs with their state")
    listing.add_argument("--root", default="runs", help="folder of the runs")
    add_subcommand(runs, "show", show_run, "show where a run stands").add_argument("run", help="runs/x")


def probe_run(
    run: str,
    config: str | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    allow_zero_adapter: bool = False,
) -> None:
    """Run probes at every checkpoint of a run, or at one; skips measurements that are on record.

    Args:
        run: `runs/x` for every checkpoint, `runs/x@step-40` for one.
        config: YAML file with `probes:`, as under `probing` in an experiment; the run's own probes if not given.
        num_examples: Number of training rows of each stream to measure on; overrides the YAML file.
        batch_size: Number of rows in one forward pass; overrides the YAML file.
        allow_zero_adapter: Whether to measure an adapter that changes no logit.
    """
    from rich.progress import track

    from lightning_em.rebuild import probe_run as measure

    folder = locate(run)[0]
    shown = partial(track, description=f"probing {folder.path.name}", console=console)
    measured = measure(run, config, num_examples, batch_size, allow_zero_adapter, shown)
    console.print(f"{measured} new records in {folder.probe_folder}.")


def list_runs(root: str = "runs") -> None:
    """List the runs in a folder with their state.

    Args:
        root: Folder of the runs.
    """
    folders = [RunFolder(file.parent) for file in sorted(Path(root).glob("*/run.json"))]
    if not folders:
        raise ValueError(f"there is no run under {root!r}; fit one, or give another --root.")
    states = job_states()
    table = Table("run", "status", "last checkpoint", "attempts", "job", title=f"runs in {root}")
    for folder in folders:
        record, steps = folder.read_run(), folder.steps()
        last = f"step {steps[-1]} of {record.get('max_steps')}" if steps else "none"
        attempts, job = str(len(record.get("attempts", []))), job_of(record)
        status = status_in_queue(folder.status(), job, states)
        table.add_row(folder.path.name, status, last, attempts, described(job, states))
    console.print(table)


def show_run(run: str) -> None:
    """Show the state of a run: status, identity, newest checkpoint, last metrics and probe records.

    Args:
        run: Folder of the run.
    """
    folder, checkpoint = locate(run)
    record = folder.read_run()
    table = Table("what", "value", title=str(folder.path), show_header=False)
    for key in ("status", "exit_reason", "base", "last_step"):
        table.add_row(key, str(record.get(key)))
    if isinstance(identity := record.get("identity"), dict):
        table.add_row("identity", str({key: identity[key] for key in ("name", "data", "start")}))
    for warning in record.get("warnings", ()):
        table.add_row("warning", warning)
    table.add_row("newest valid checkpoint", f"step {step_of(checkpoint)}")
    metrics = read_metrics(folder.metrics_file)
    for name in sorted({name for values in metrics.values() for name in values}):
        step = max(step for step, values in metrics.items() if name in values)
        table.add_row(f"{name} at step {step}", f"{metrics[step][name]:.6g}")
    for result in folder.probe_results():
        table.add_row(f"probe {result.probe}", f"step {result.step}, {len(result.points)} points")
    console.print(table)
