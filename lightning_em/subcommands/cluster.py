"""Subcommands for clusters: `submit` writes and queues Slurm jobs, `doctor` checks whether a machine can run them."""

import hashlib
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lightning_em.subcommands.wiring import add_subcommand, console

if TYPE_CHECKING:
    from lightning_em.cluster import FitJob, JobArray, SlurmOptions
    from lightning_em.study import Study

# Remarks go to standard error, so that `--dry_run > job.sbatch` writes a valid batch file.
remarks = Console(stderr=True, highlight=False)

_INTEGERS = ("nodes", "gpus", "tasks", "cpus", "at_once")
_HELP = {
    "partition": "where to run", "nodes": "machines", "gpus": "GPUs of a node, 0 for none", "cpus": "cores of a task",
    "tasks": "tasks of a node, if not one a GPU", "time": "limit, e.g. 24:00:00", "memory": "of a node, e.g. 64G",
    "account": "who pays", "qos": "quality of service", "constraint": "features of the nodes",
    "at_once": "fits of an array at a time", "extra": "another option of sbatch, e.g. --slurm.extra=--exclusive",
}  # fmt: skip


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    from lightning_em.cluster.script import SlurmOptions

    text = "write a Slurm batch file for a fit, a sweep or a study, and submit it; other options are those of fit"
    submitting = add_subcommand(subcommands, "submit", submit_jobs, text)
    submitting.add_argument("--study", help="submit every run of configs/study/x.yaml")
    submitting.add_argument("--root", help="with --study: folder of its runs")
    submitting.add_argument(
        "--sweep", action="append", help="model.objective.kl_weight=0,1,10; give it again for a product"
    )
    submitting.add_argument("--dry_run", action="store_true", help="print the batch file, do nothing")
    for field in fields(SlurmOptions):
        kind: dict[str, Any] = {"type": int} if field.name in _INTEGERS else {}
        kind |= {"action": "append"} if field.name == "extra" else {}
        submitting.add_argument(f"--slurm.{field.name}", help=_HELP[field.name], **kind)
    _keep_other_words(submitting)

    checking = add_subcommand(
        subcommands,
        "doctor",
        check_machine,
        "can this machine run an experiment? exit code 1 on faults; other args: fit's",
    )
    checking.add_argument("--prefetch", action="store_true", help="download model and tokenizer first")
    checking.add_argument(
        "--gpu_gib", type=float, help="memory of the GPUs it is meant for, if not this machine's"
    )
    _keep_other_words(checking)


def submit_jobs(
    args: Sequence[str],
    study: str | None = None,
    root: str | None = None,
    sweep: Sequence[str] | None = None,
    dry_run: bool = False,
    **slurm: Any,
) -> None:
    """Write batch files and submit them.

    Args:
        args: Command-line arguments after `fit`.
        study: Study file whose runs are submitted instead.
        root: Folder of the study's runs.
        sweep: Variations of the fit, each as `key=value,value`.
        dry_run: Whether to print the files only.
        slurm: Fields of `SlurmOptions`, with keys that start with `slurm.`.

    Raises:
        ValueError: If two fits would write into the same folder, a folder is in use, or Slurm refuses a job.
    """
    from lightning_em.cluster import SlurmOptions, arrays_of, batch_script, submit

    given = {key.removeprefix("slurm."): value for key, value in slurm.items() if value is not None}
    options = SlurmOptions(**given | {"extra": tuple(given.get("extra", ()))})
    if study:
        if args or sweep:
            raise ValueError(f"--study takes every run from its file; leave out {[*args, *(sweep or ())]}.")
        folder, jobs = _jobs_of_study(study, root, dry_run, options)
    else:
        folder, jobs = _jobs_of_words(args, sweep or (), options)
    _refuse_shared_folders(jobs)
    ids: dict[int, str] = {}
    for array in arrays_of(_left_to_do(jobs)):
        name = _job_name(array, folder)
        file = folder / "slurm" / f"{name}.sbatch"
        script = batch_script(array, name, options, file.parent)
        if dry_run:
            remarks.print(Text(f"# {file}"), soft_wrap=True)
            sys.stdout.write(script)
            continue
        ids[id(array)] = submit(array, script, file, ids.get(id(array.after)))
        console.print(f"job {ids[id(array)]}: {len(array.jobs)} fit{'s' * (len(array.jobs) > 1)}, {file}")


def _jobs_of_words(
    args: Sequence[str], sweeps: Sequence[str], options: "SlurmOptions"
) -> tuple[Path, list["FitJob"]]:
    from lightning_em import imports
    from lightning_em.cluster.jobs import FitJob, variations
    from lightning_em.cluster.script import devices_asked
    from lightning_em.experiment import Experiment, as_options
    from lightning_em.preflight import refuse_missing_kl_data, refuse_settings

    if not args:
        raise ValueError("submit needs what fit needs: --config configs/experiment/x.yaml, or --study.")
    allowed = imports.as_args()  # `imports.take` has removed them from `args`; the job needs them again
    devices = as_options({f"trainer.{key}": count for key, count in devices_asked(options).items()})
    jobs, roots = [], []
    for flags in variations(sweeps):
        experiment = Experiment([*args, *flags, *devices])
        refuse_settings(experiment.config["trainer"])
        refuse_missing_kl_data(experiment.config)
        experiment.refuse_other_run()
        jobs.append(FitJob((*args, *allowed, *flags), experiment.folder.path))
        roots.append(experiment.config["run"]["root"])
    return Path(roots[0]), jobs


def _jobs_of_study(
    study: str, root: str | None, dry_run: bool, options: "SlurmOptions"
) -> tuple[Path, list["FitJob"]]:
    from lightning_em import imports
    from lightning_em.analysis.cells import StudyFolder
    from lightning_em.cluster.jobs import FitJob
    from lightning_em.study import read_study, with_identities

    plan, allowed = read_study(study, root), imports.as_args()
    for run in plan.runs:
        _refuse_other_devices(study, run.args, options)
    plan = with_identities(plan, [run.name for run in plan.runs])
    _refuse_other_runs(plan)
    if not dry_run:
        StudyFolder(plan.root).write(plan.name, [run.cell for run in plan.runs], asdict(plan.rules))
    jobs = [
        FitJob(
            (*run.args, *allowed),
            plan.root / run.name,
            plan.root / run.cell.init_from if run.cell.init_from else None,
        )
        for run in plan.runs
    ]
    return plan.root, jobs


def _refuse_other_runs(plan: "Study") -> None:
    """Refuse a study with a folder that holds another run.

    Such a run would be skipped silently if the other one is finished, and would fail in its job if not.
    """
    from lightning_em.study.states import standings

    reasons = {name: standing.reason for name, standing in standings(plan).items() if standing.reason}
    if reasons:
        listed = "; ".join(f"{plan.root / name} ({reason})" for name, reason in reasons.items())
        raise ValueError(
            f"other runs than the study means are in {listed}. Remove these folders to run them anew, or keep them "
            "and give the study another --root."
        )


def _refuse_other_devices(study: str, args: Sequence[str], options: "SlurmOptions") -> None:
    """Refuse a number of processes that differs from the study's: it would change the rows per optimizer step."""
    from lightning_em.cluster.script import devices_asked
    from lightning_em.preflight import num_processes, refuse_settings, settings_of

    trainer, started = settings_of(args, "trainer"), math.prod(devices_asked(options).values())
    refuse_settings(trainer)
    if started != (wanted := num_processes(trainer)):
        raise ValueError(
            f"Slurm would start {started} processes a run, but a run of {study} trains with {wanted}: each step would "
            f"have {started}/{wanted} of its rows. Ask for one GPU a run (--slurm.gpus 1; the runs go side by side), "
            "or say in the study's `set` what you mean: trainer.devices, and a trainer.accumulate_grad_batches that "
            "keeps the rows."
        )


def _left_to_do(jobs: Sequence["FitJob"]) -> list["FitJob"]:
    """Leave out the jobs whose run is finished, and print their folders.

    Raises:
        ValueError: If a process holds one of the run folders.
    """
    from lightning_em import lock
    from lightning_em.runs import RunFolder

    for job in jobs:
        lock.refuse_if_held(job.folder)
    finished = [job for job in jobs if RunFolder(job.folder).read_run().get("status") == "finished"]
    for job in finished:
        remarks.print(Text(f"{job.folder} is finished: nothing to submit."), soft_wrap=True)
    return [job for job in jobs if job not in finished]


def _refuse_shared_folders(jobs: Sequence["FitJob"]) -> None:
    folders = [job.folder for job in jobs]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise ValueError(
            f"several fits would write into {', '.join(twice)}; leave --run.name out of a sweep, so that each is "
            "named after its own config, and sweep what makes a difference to the result."
        )


def _job_name(array: "JobArray", folder: Path) -> str:
    """Name of a job: the name of its run; for an array, the shared beginning of the names and a hash of them."""
    from lightning_em.cluster.jobs import shared_beginning

    names = [job.folder.name for job in array.jobs.values()]
    if len(names) == 1 and array.after is None:
        return names[0]
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:6]
    beginning = names[0][: shared_beginning(names)].rpartition("-")[0]
    return f"{beginning or folder.name}-array-{digest}"


def check_machine(args: Sequence[str], prefetch: bool = False, gpu_gib: float | None = None) -> int:
    """Check that this machine has everything an experiment needs.

    Args:
        args: Command-line arguments after `fit`.
        prefetch: Whether to download model and tokenizer first.
        gpu_gib: Memory of the intended GPUs in GiB; that of this machine's GPUs if not given.

    Returns:
        Exit code: 0, or 1 if there is a fault.
    """
    from lightning_em.cluster.doctor import check, report_table

    findings = check(args, prefetch, gpu_gib)
    console.print(report_table(findings))
    return int(any(finding.is_fault for finding in findings))


def _keep_other_words(parser: ArgumentParser) -> None:
    """Make a subcommand accept unknown options, and pass them to it as `args` for the parser of `fit`."""
    parse: Callable[..., tuple[Namespace, list[str]]] = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        found, rest = parse(args, namespace)
        found.args = rest
        return found, []

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]
