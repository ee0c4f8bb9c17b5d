"""Write a batch file from the template configs/slurm/fit.sbatch. Never imports torch."""

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lightning_em.cluster.jobs import FitJob, JobArray, shared_beginning
from lightning_em.preflight import refuse_control_characters

_COMMAND = "srun "
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_PLAIN = re.compile(r"[\w%+,./:=@^-]*")


@dataclass(frozen=True)
class SlurmOptions:
    """Options for sbatch; options that are not set keep their value in configs/slurm/fit.sbatch.

    Attributes:
        partition: Partition to run on.
        nodes: Number of nodes.
        gpus: GPUs per node, with one task each; 0 for a job on the CPU.
        tasks: Tasks per node, if it is not one per GPU.
        cpus: CPU cores per task.
        time: Time limit, e.g. 24:00:00; 90 seconds before it the run saves and is requeued.
        memory: Memory per node, e.g. 64G.
        account: Account to charge.
        qos: Quality of service.
        constraint: Required features of the nodes.
        at_once: Number of fits of an array that may run at the same time.
        extra: Further options of sbatch, e.g. --exclusive.
    """

    partition: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    tasks: int | None = None
    cpus: int | None = None
    time: str | None = None
    memory: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    at_once: int | None = None
    extra: tuple[str, ...] = ()

    def directives(self) -> dict[str, str | None]:
        """Return options of sbatch by name; None removes an option from the template."""
        tasks = self.tasks if self.tasks is not None or self.gpus is None else max(1, self.gpus)
        given = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "time": self.time,
        }
        found: dict[str, str | None] = {key: str(value) for key, value in given.items() if value is not None}
        if self.gpus == 0:
            found["gpus-per-node"] = None
        for option in self.extra:
            key, _, value = option.removeprefix("--").partition("=")
            if not _OPTION.fullmatch(key):
                raise ValueError(
                    "--slurm.extra expects a long option of sbatch, as in --slurm.extra=--mail-type=END, got "
                    f"{option!r}."
                )
            found[key] = value
        return found


def devices_asked(options: SlurmOptions) -> dict[str, int]:
    """Return the nodes and devices that srun will start, under the trainer's keys; both enter the run's identity."""
    asked = _directives(_template()) | options.directives()
    return {"num_nodes": int(str(asked["nodes"])), "devices": int(str(asked["ntasks-per-node"]))}


def batch_script(array: JobArray, name: str, options: SlurmOptions, logs: Path) -> str:
    """Write the batch file of one fit, or of an array of fits.

    Args:
        array: Fits to run.
        name: Job name.
        options: Options for sbatch.
        logs: Folder of Slurm's log files.

    Raises:
        ValueError: If a value contains a line break or control character, because sbatch and the shell would read
            the rest as further lines of the file.
    """
    asked, folders = options.directives(), [job.folder for job in array.jobs.values()]
    refuse_control_characters("a line of the batch file", name, logs, *asked, *asked.values(), *folders)
    alone = len(array.jobs) == 1 and array.after is None
    set_words: dict[str, str | None] = {
        "job-name": name,
        "output": str(Path(str(logs).replace("%", "%%")) / ("%x-%j.out" if alone else "%x-%A_%a.out")),
    }
    if not alone:
        at_once = f"%{options.at_once}" if options.at_once else ""
        set_words["array"] = f"{_ranges(sorted(array.jobs))}{at_once}"
    lines = _with_directives(_template().splitlines(), asked | set_words)
    (command,) = (number for number, line in enumerate(lines) if line.startswith(_COMMAND))
    before = lines[:command]
    if _on_path() is not None:
        before.append(f"export PATH={shlex.quote(str(_on_path()))}:$PATH")
    before += _set_words(next(iter(array.jobs.values()))) if alone else _cases(array)
    return "\n".join([*before, *lines[command:]]) + "\n"


def _template() -> str:
    return files("lightning_em.configs").joinpath("slurm/fit.sbatch").read_text(encoding="utf-8")


def _directives(text: str) -> dict[str, str]:
    found = (line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if _is_one(line))
    return {key: value for key, _, value in found}


def _is_one(line: str) -> bool:
    return line.startswith("#SBATCH --")


def _with_directives(lines: list[str], wanted: dict[str, str | None]) -> list[str]:
    """Change, remove and add options in the template's lines; drop the comments that describe the template."""
    kept = [line for line in lines if not line.startswith("# ") and not _is_one(line)]
    both = _directives("\n".join(lines)) | wanted
    asked = [
        f"#SBATCH --{key}{'=' * bool(value)}{_for_sbatch(value)}"
        for key, value in both.items()
        if value is not None
    ]
    return [kept[0], *asked, *kept[1:]]


def _set_words(job: FitJob) -> list[str]:
    return [f"# {job.folder}", f"set -- {_quoted(job.args)}"]


def _cases(array: JobArray) -> list[str]:
    """Write one command line per array index; arguments common to all are written once."""
    all_words = [job.args for job in array.jobs.values()]
    shared = all_words[0][: shared_beginning(all_words)] if len(all_words) > 1 else ()
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for index, job in sorted(array.jobs.items()):
        lines.append(f"  {index}) set -- {_quoted(job.args[len(shared) :])} ;;  # {job.folder}")
    lines.append("esac")
    return [*lines, f'set -- {_quoted(shared)} "$@"'] if shared else lines


def _quoted(args: tuple[str, ...] | list[str]) -> str:
    return " ".join(shlex.quote(word) for word in args)


def _for_sbatch(value: str) -> str:
    """Quote a value for sbatch, which understands quotes and backslashes but is not a shell."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _ranges(indices: list[int]) -> str:
    """Format indices as ranges: `0-3,7` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _on_path() -> Path | None:
    """Return the folder of this environment's commands if `lightning-em` is not on PATH without it."""
    folder = Path(sys.executable).parent
    found = shutil.which("lightning-em")
    return None if found is not None and Path(found).parent == folder else folder
