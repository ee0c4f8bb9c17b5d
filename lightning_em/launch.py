"""What cannot run is refused before anything heavy is imported, with what can. Never imports torch."""

import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_em.errors import options_of, place_of

SHARDED = "trainer.strategy.class_path=lightning_em.strategies.ShardedBase (configs/trainer/fsdp2.yaml)"
DDP = "trainer.strategy=ddp (configs/trainer/ddp4.yaml)"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_GPU_FILES = ("nvidia*", "kfd", "dxg")  # of NVIDIA, AMD, and Windows' Linux
_WHOLE_PRECISION = ("None", "32", "32-true")

# By the beginning of a name or class name in lower case: why it cannot work, and what does.
_REFUSED = {
    "fsdp": ("FSDP1 flattens the adapter together with the frozen base", SHARDED),
    "deepspeed": ("DeepSpeed owns optimiser and checkpoints, ours hold the adapter alone", SHARDED),
    "modelparallel": (
        "Lightning's ModelParallelStrategy shards nothing by itself and reduces no gradient of an adapter",
        SHARDED,
    ),
    "model_parallel": ("it shards nothing by itself and reduces no gradient of an adapter", SHARDED),
    "ddp_spawn": ("started by spawn, its processes have no command line to resume by", DDP),
    "ddp_fork": ("forked processes cannot use a GPU that the parent has touched", DDP),
    "ddp_notebook": ("forked processes cannot use a GPU that the parent has touched", DDP),
    "xla": ("the base is not loaded onto TPUs", DDP),
}


def refuse_settings(trainer: Mapping[str, Any]) -> None:
    """Refuse what cannot work of a trainer's settings, or would not do what it says.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: Why, and what to write instead.
    """
    refuse_strategy(trainer)
    refuse_precision(trainer)
    refuse_devices(trainer)
    refuse_accelerator(trainer)
    refuse_logger(trainer)


def refuse_strategy(trainer: Mapping[str, Any]) -> None:
    """Refuse a strategy under which training would fail, hang, or give other numbers.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: Why it cannot work, and which strategy does.
    """
    strategy = trainer.get("strategy")
    chosen = strategy.get("class_path", "") if isinstance(strategy, Mapping) else strategy
    if not isinstance(chosen, str):
        return
    options = strategy.get("init_args") or {} if isinstance(strategy, Mapping) else {}
    name = chosen.rsplit(".", 1)[-1].lower()
    method = str(options.get("start_method") or "popen")
    if name.startswith("ddp") and method != "popen":
        name = f"ddp_{method}"
    for beginning, (reason, instead) in _REFUSED.items():
        if name.startswith(beginning):
            raise ValueError(f"trainer.strategy {chosen} cannot work here: {reason}. Use {instead}.")


def refuse_precision(trainer: Mapping[str, Any]) -> None:
    """Refuse a precision of Lightning's: the base has a dtype of its own, and the adapter stays float32.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: Why it cannot work, and what to set instead.
    """
    chosen = str(trainer.get("precision"))
    if chosen in _WHOLE_PRECISION:
        return
    dtype = "float64" if chosen.startswith("64") else "float16" if chosen.startswith("16") else "bfloat16"
    reason = (
        "training would compute under autocast and probes without it, two different models"
        if chosen.endswith("-mixed") or chosen in ("16", "bf16")
        else "it casts the adapter and its optimiser too, where small updates vanish"
        if dtype != "float64"
        else "it casts the adapter and its optimiser too, and what is saved is float32"
    )
    raise ValueError(
        f"trainer.precision {chosen} cannot work here: {reason}. Set model.base.dtype: {dtype} and leave "
        "trainer.precision out: the frozen base gets that dtype, the adapter and its optimiser stay float32."
    )


def refuse_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse a number of devices that the machine decides, and one that the strategy does not use.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: What to write instead.
    """
    count, devices, strategy = num_processes(trainer), trainer.get("devices"), trainer.get("strategy")
    if count is None:
        raise ValueError(
            f"trainer.devices {devices} means as many as there happen to be, but their number decides how many rows a "
            "step has, and so which run it is: write the number, and trainer.accumulate_grad_batches to go with it."
        )
    chosen = str(strategy.get("class_path") if isinstance(strategy, Mapping) else strategy)
    if count > 1 and chosen.rsplit(".", 1)[-1].lower().startswith(("single_device", "singledevice")):
        raise ValueError(
            f"trainer.strategy {chosen} uses one device, but trainer.devices x trainer.num_nodes is {count}: set them "
            f"to 1, or use {DDP}."
        )


def refuse_accelerator(trainer: Mapping[str, Any]) -> None:
    """Refuse an accelerator that the base is not loaded onto.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: What to write instead.
    """
    if str(trainer.get("accelerator")).lower() in ("tpu", "hpu", "xla"):
        raise ValueError(
            f"trainer.accelerator {trainer['accelerator']} cannot work here: the base is not loaded onto it. Use "
            "gpu or cpu (configs/trainer/gpu1.yaml, cpu.yaml)."
        )
    chosen, here = trainer.get("accelerator") or "auto", (sys.platform, platform.machine())
    if chosen == "mps" or (here == ("darwin", "arm64") and chosen in ("auto", "gpu")):
        raise ValueError(
            f"trainer.accelerator {chosen} means Apple's GPU, which has no float64: the sums of "
            "losses are. Use --trainer.accelerator cpu."
        )


def refuse_logger(trainer: Mapping[str, Any]) -> None:
    """Refuse a logger that is no logger: `metrics.csv` is always written.

    Args:
        trainer: Settings of the trainer.

    Raises:
        ValueError: What to write instead.
    """
    if trainer.get("logger") is True:
        raise ValueError(
            "trainer.logger true names no logger: leave it out (metrics.csv is always written), or name one beside it, "
            "e.g. trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger."
        )


def refuse_missing_gpu(trainer: Mapping[str, Any], args: Sequence[str], devices: Path = Path("/dev")) -> None:
    """Refuse an accelerator whose device files are not here, before torch is imported to find that out.

    Args:
        trainer: Settings of the trainer.
        args: The command line, to say where the accelerator is named.
        devices: Folder of the device files.

    Raises:
        ValueError: What to write instead.
    """
    chosen, here = trainer.get("accelerator"), any(any(devices.glob(name)) for name in _GPU_FILES)
    if chosen in ("gpu", "cuda") and sys.platform == "linux" and not here:
        raise ValueError(
            f"trainer.accelerator is {chosen}{place_of('trainer.accelerator', args)}, but there is no GPU here; set "
            "--trainer.accelerator cpu, or send it to a machine that has one with lightning-em submit."
        )


def refuse_control_characters(what: str, *texts: object) -> None:
    """Refuse line breaks and the like in what becomes a path, a log line, and a line of a batch file.

    Args:
        what: They are for.
        texts: To look at; None is let through.

    Raises:
        ValueError: The text, with what is wrong made visible.
    """
    for text in texts:
        if _CONTROL.search(str(text)):
            raise ValueError(
                f"{what} must have no line breaks or other control characters, got {str(text)!r}."
            )


def refuse_task_count(trainer: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a trainer that expects another number of processes than srun or torchrun has started.

    Lightning would wait for ranks that never come, or train one independent copy a task, each with exit code 0.

    Raises:
        ValueError: Both numbers and the keys to change.
    """
    wanted = num_processes(trainer)
    if wanted is None:
        return
    by_torchrun = "RANK" in environment and "WORLD_SIZE" in environment  # also by one that srun has started
    launcher, variable = ("torchrun", "WORLD_SIZE") if by_torchrun else ("srun", "SLURM_STEP_NUM_TASKS")
    started = environment.get(variable)
    if started is not None and int(started) != wanted and (by_torchrun or not _is_shell(environment)):
        raise ValueError(
            f"{launcher} has started {started} processes, but trainer.devices x trainer.num_nodes is "
            f"{wanted}. Set --trainer.devices to the tasks of a node and --trainer.num_nodes to the nodes."
        )
    in_batch_script = "SLURM_JOB_ID" in environment and started is None
    if in_batch_script and wanted > 1 and int(environment.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but lightning-em was started once: write "
            "`srun lightning-em ...`, as configs/slurm/fit.sbatch does."
        )


def num_processes(trainer: Mapping[str, Any]) -> int | None:
    """Processes that a trainer's settings ask for; None for as many devices as there happen to be."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices
    known = [int(each) for each in (count, nodes) if str(each).isdecimal() and int(each) > 0]
    return math.prod(known) if len(known) == 2 else None  # "auto" and -1 are no numbers


def _is_shell(environment: Mapping[str, str]) -> bool:
    """An interactive job, in which Lightning starts its processes itself."""
    return environment.get("SLURM_JOB_NAME") in ("bash", "interactive")


def settings_of(args: Sequence[str], group: str, read: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Settings of one group as far as arguments and config files give them; cheap, and without torch.

    The parser comes later, knows the defaults and says what is wrong; what cannot be read is left out here.

    Args:
        args: Command-line arguments.
        group: Top-level key, such as `trainer`.
        read: How values of options are read; as YAML if not given.
    """
    found: dict[str, Any] = {}
    for key, value in options_of(args):
        if key == "config":
            found |= _mapping_of(Path(value), group)
        elif key == group:
            found |= _mapping_of(Path(value))
        elif key.startswith(f"{group}."):
            *parents, last = key.removeprefix(f"{group}.").split(".")
            inner = found
            for parent in parents:
                kept = inner.get(parent)
                named: dict[str, Any] = {"class_path": kept} if isinstance(kept, str) else {}
                nested = dict(kept) if isinstance(kept, Mapping) else named
                inner[parent] = nested
                inner = nested
            inner[last] = (read or _plain)(value)
    return found


def run_path(args: Sequence[str]) -> Path | None:
    """The run folder that arguments or config files name outright; None if only the config's hash tells."""
    options = {"root": "runs"} | settings_of(args, "run", str)
    return Path(str(options["root"])) / str(options["name"]) if options.get("name") else None


def _plain(value: str) -> Any:
    """A value as the parser will read it: a number, a list, or the text itself."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _mapping_of(file: Path, group: str | None = None) -> dict[str, Any]:
    """Content of a YAML file, or of one group in it, which may be a reference to another file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content = content if group is None else content.get(group)
        return _mapping_of(file.parent / content) if isinstance(content, str) else dict(content)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return {}
