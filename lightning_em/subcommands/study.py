"""Subcommands for studies: `study expand`, `run`, `status` and `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_em.subcommands.wiring import add_subcommand, console, lazily


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    study = subcommands.add_parser("study", help="many runs from one file: arms x adapters x seeds")
    study = study.add_subparsers(required=True)
    expand = _on_a_file(study, "expand", expand_study, "write one whole config a run, to run by itself")
    expand.add_argument("--output", help="folder of the configs; default ROOT/configs")
    _selection(expand)
    run = _on_a_file(
        study, "run", run_study, "run what is not finished; the same command continues after a kill"
    )
    run.add_argument("--workers", type=int, default=2, help="runs at a time, each in a process of its own")
    run.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    _selection(run)
    _on_a_file(study, "status", show_status, "where every run stands")
    report = add_subcommand(
        study, "report", lazily("lightning_em.study.report", "report"), "claims, measurements and verdicts"
    )
    where = (
        "configs/study/x.yaml, the root of its runs, or a measurements.csv; default the one study under runs"
    )
    report.add_argument("study", nargs="?", help=where)
    report.add_argument(
        "--root", help="with the file of a study: folder of its runs; default runs/study-NAME"
    )
    report.add_argument(
        "--markdown", help="also write the tables into this file: a new one, or between its markers"
    )
    report.add_argument("--figures", help="also draw the figures into this folder")


def expand_study(
    study: str,
    root: str | None = None,
    output: str | None = None,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    adapters: Sequence[str] | None = None,
) -> None:
    """Write one complete config per run.

    Args:
        study: Study file.
        root: Folder of the runs; `runs/study-<name>` if not given.
        output: Folder of the configs; `configs` in the root if not given.
        seeds: Seeds to select; all if not given.
        arms: Arms to select, with those they start from; all if not given.
        adapters: Adapters to select; all if not given.
    """
    from lightning_em.study import read_study
    from lightning_em.study.expansion import expand

    plan = read_study(study, root)
    runs = plan.chosen(seeds, arms, adapters)
    folder = expand(plan, Path(output) if output else None, runs)
    console.print(f"{len(runs)} configs in {folder}; run one with")
    console.print(f"  lightning-em fit --config {folder / runs[0].name}.yaml", soft_wrap=True)


def run_study(
    study: str,
    root: str | None = None,
    workers: int = 2,
    threads: int = 1,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    adapters: Sequence[str] | None = None,
) -> int:
    """Run the unfinished runs of a study.

    Args:
        study: Study file.
        root: Folder of the runs; `runs/study-<name>` if not given.
        workers: Number of runs at a time, each in a process of its own.
        threads: Number of torch threads in each process.
        seeds: Seeds to select; all if not given.
        arms: Arms to select, with those they start from; all if not given.
        adapters: Adapters to select; all if not given.

    Returns:
        Exit code: 0, or 1 if a task failed or was skipped.
    """
    from lightning_em.study import read_study
    from lightning_em.study.execution import run_study as run_now

    plan = read_study(study, root)
    return run_now(plan, plan.chosen(seeds, arms, adapters), workers, threads, console)


def show_status(study: str, root: str | None = None) -> None:
    """Show the state of every run of a study, and what differs if a folder holds another run.

    Args:
        study: Study file.
        root: Folder of the runs; `runs/study-<name>` if not given.
    """
    from lightning_em.study import read_study
    from lightning_em.study.states import standings, status_table

    plan = read_study(study, root)
    found = standings(plan)
    console.print(status_table(plan, found))
    for reason in dict.fromkeys(each.reason for each in found.values() if each.reason):
        runs = [name for name, each in found.items() if each.reason == reason]
        console.print(f"differs: {', '.join(runs)}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _on_a_file(subcommands: Any, name: str, call: Any, text: str) -> Any:
    parser = add_subcommand(subcommands, name, call, text)
    parser.add_argument("study", help="the study's file, e.g. configs/study/miniature.yaml")
    parser.add_argument("--root", help="folder of the runs; default runs/study-NAME")
    return parser


def _selection(parser: Any) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only these, and those they start from")
    parser.add_argument("--adapters", nargs="+", help="only these")
