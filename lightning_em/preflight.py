"""Reject invalid trainer settings before heavy imports, and suggest valid ones. Never imports torch."""

import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_em.config_args import ordered
from lightning_em.errors import options_of, place_of

SHARDED = "trainer.strategy.class_path=lightning_em.strategies.ShardedBase (configs/trainer/fsdp2.yaml)"
DDP = "trainer.strategy=ddp (configs/trainer/ddp4.yaml)"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_GPU_FILES = ("nvidia*", "kfd", "dxg")  # device files of NVIDIA, AMD, and Windows' Linux subsystem
_WHOLE_PRECISION = ("None", "32", "32-true")

# Prefix of a strategy's name or class name in lower case -> why it cannot work, and what does.
_REFUSED = {
    "fsdp": ("FSDP1 flattens the adapter together with the frozen base", SHARDED),
    "deepspeed": (
        "DeepSpeed owns optimizer and checkpoints; checkpoints here hold the adapter alone",
        SHARDED,
    ),
    "modelparallel": (
        "Lightning's ModelParallelStrategy shards nothing by itself and does not reduce an adapter's gradients",
        SHARDED,
    ),
    "model_parallel": ("it shards nothing by itself and does not reduce an adapter's gradients", SHARDED),
    "ddp_spawn": ("spawned processes have no command line to resume with", DDP),
    "ddp_fork": ("forked processes cannot use a GPU that the parent has initialized", DDP),
    "ddp_notebook": ("forked processes cannot use a GPU that the parent has initialized", DDP),
    "xla": ("the base model cannot be loaded onto TPUs", DDP),
}


def refuse_settings(trainer: Mapping[str, Any]) -> None:
    """Reject trainer settings that cannot work or would not do what they say.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If a setting is rejected; the message gives the reason and a valid setting.
    """
    refuse_strategy(trainer)
    refuse_precision(trainer)
    refuse_devices(trainer)
    refuse_accelerator(trainer)
    refuse_logger(trainer)


def refuse_strategy(trainer: Mapping[str, Any]) -> None:
    """Reject a strategy under which training would fail, hang, or give other numbers.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If the strategy is rejected; the message gives the reason and a valid strategy.
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
    """Reject Lightning's precision settings: the base model has its own dtype, and the adapter stays float32.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If the precision is rejected; the message gives the reason and a valid setting.
    """
    chosen = str(trainer.get("precision"))
    if chosen in _WHOLE_PRECISION:
        return
    dtype = "float64" if chosen.startswith("64") else "float16" if chosen.startswith("16") else "bfloat16"
    reason = (
        "training would compute under autocast and probes without it, two different models"
        if chosen.endswith("-mixed") or chosen in ("16", "bf16")
        else "it also casts the adapter and its optimizer, where small updates would be lost"
        if dtype != "float64"
        else "it also casts the adapter and its optimizer, but checkpoints are float32"
    )
    raise ValueError(
        f"trainer.precision {chosen} cannot work here: {reason}. Set model.base.dtype: {dtype} and leave "
        "trainer.precision out: the frozen base model gets that dtype, the adapter and its optimizer stay float32."
    )


def refuse_devices(trainer: Mapping[str, Any]) -> None:
    """Reject a number of devices that depends on the machine, or that the strategy does not use.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If the number is rejected; the message gives a valid setting.
    """
    count, devices, strategy = num_processes(trainer), trainer.get("devices"), trainer.get("strategy")
    if count is None:
        raise ValueError(
            f"trainer.devices {devices} depends on the machine, but the number of devices determines the rows per "
            "optimizer step, and with it the run's identity: write the number, and a matching "
            "trainer.accumulate_grad_batches."
        )
    chosen = str(strategy.get("class_path") if isinstance(strategy, Mapping) else strategy)
    if count > 1 and chosen.rsplit(".", 1)[-1].lower().startswith(("single_device", "singledevice")):
        raise ValueError(
            f"trainer.strategy {chosen} uses one device, but trainer.devices x trainer.num_nodes is {count}: set them "
            f"to 1, or use {DDP}."
        )


def refuse_accelerator(trainer: Mapping[str, Any]) -> None:
    """Reject an accelerator that the base model cannot be loaded onto.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If the accelerator is rejected; the message gives a valid setting.
    """
    if str(trainer.get("accelerator")).lower() in ("tpu", "hpu", "xla"):
        raise ValueError(
            f"trainer.accelerator {trainer['accelerator']} cannot work here: the base model cannot be loaded onto it. "
            "Use gpu or cpu (configs/trainer/gpu1.yaml, cpu.yaml)."
        )
    chosen, here = trainer.get("accelerator") or "auto", (sys.platform, platform.machine())
    if chosen == "mps" or (here == ("darwin", "arm64") and chosen in ("auto", "gpu")):
        raise ValueError(
            f"trainer.accelerator {chosen} means Apple's GPU, which has no float64, but losses are summed in "
            "float64. Use --trainer.accelerator cpu."
        )


def refuse_logger(trainer: Mapping[str, Any]) -> None:
    """Reject `logger: true`, which names no logger; `metrics.csv` is always written.

    Args:
        trainer: Trainer settings.

    Raises:
        ValueError: If the logger is `true`; the message gives a valid setting.
    """
    if trainer.get("logger") is True:
        raise ValueError(
            "trainer.logger true names no logger: leave it out (metrics.csv is always written), or name another one, "
            "e.g. trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger."
        )


def refuse_missing_gpu(trainer: Mapping[str, Any], args: Sequence[str], devices: Path = Path("/dev")) -> None:
    """Reject a GPU accelerator if the GPU's device files are missing, without importing torch.

    Args:
        trainer: Trainer settings.
        args: Command-line arguments, used to locate the setting.
        devices: Folder of the device files.

    Raises:
        ValueError: If there is no GPU; the message gives a valid setting.
    """
    chosen, here = trainer.get("accelerator"), any(any(devices.glob(name)) for name in _GPU_FILES)
    if chosen in ("gpu", "cuda") and sys.platform == "linux" and not here:
        raise ValueError(
            f"trainer.accelerator is {chosen}{place_of('trainer.accelerator', args)}, but there is no GPU here; set "
            "--trainer.accelerator cpu, or use lightning-em submit to run on a machine with a GPU."
        )


def refuse_missing_kl_data(config: Mapping[str, Any]) -> None:
    """Reject a KL weight without KL data: the general solution would be trained under another name.

    Args:
        config: Resolved config of an experiment.

    Raises:
        ValueError: If the KL can get a weight, constant or by schedule, but there is no KL data.
    """
    objective = config["model"]["objective"]
    if objective["kl_weight"] > 0 and config["data"]["kl"] is None:
        raise ValueError(
            f"data.kl is missing while model.objective.kl_weight is {objective['kl_weight']:g}: there is nothing to "
            "compute the KL on. Set data.kl.path, or set model.objective.kl_weight to 0 to train without the KL."
        )


def refuse_control_characters(what: str, *texts: object) -> None:
    """Reject line breaks and other control characters in text that becomes a path, a log line or a batch file line.

    Args:
        what: Name of the setting, for the message.
        texts: Values to check.

    Raises:
        ValueError: If a value contains a control character; the message shows it escaped.
    """
    for text in texts:
        if _CONTROL.search(str(text)):
            raise ValueError(
                f"{what} must have no line breaks or other control characters, got {str(text)!r}."
            )


def refuse_task_count(trainer: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Reject a trainer that expects another number of processes than srun or torchrun has started.

    Lightning would wait for ranks that never come, or train one independent copy per task, each with exit code 0.

    Raises:
        ValueError: If the numbers differ; the message names both and the keys to change.
    """
    wanted = num_processes(trainer)
    if wanted is None:
        return
    by_torchrun = "RANK" in environment and "WORLD_SIZE" in environment  # also if srun started torchrun
    launcher, variable = ("torchrun", "WORLD_SIZE") if by_torchrun else ("srun", "SLURM_STEP_NUM_TASKS")
    started = environment.get(variable)
    if started is not None and int(started) != wanted and (by_torchrun or not _is_shell(environment)):
        raise ValueError(
            f"{launcher} has started {started} processes, but trainer.devices x trainer.num_nodes is "
            f"{wanted}. Set --trainer.devices to the tasks per node and --trainer.num_nodes to the number of nodes."
        )
    in_batch_script = "SLURM_JOB_ID" in environment and started is None
    if in_batch_script and wanted > 1 and int(environment.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but lightning-em was started once: write "
            "`srun lightning-em ...`, as configs/slurm/fit.sbatch does."
        )


def num_processes(trainer: Mapping[str, Any]) -> int | None:
    """Return the number of processes that trainer settings ask for; None if it depends on the machine."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else devices
    known = [int(each) for each in (count, nodes) if str(each).isdecimal() and int(each) > 0]
    return math.prod(known) if len(known) == 2 else None  # "auto" and -1 depend on the machine


def _is_shell(environment: Mapping[str, str]) -> bool:
    """Tell whether this is an interactive Slurm job, in which Lightning starts its processes itself."""
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
    for key, value in options_of(ordered(args)):
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
    """Parse an argument like the parser: a number, a list, or text."""
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
        return {}  # the parser reports the error later
