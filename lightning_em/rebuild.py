"""Rebuild module, data and probes from a run's config and one of its checkpoints."""

import inspect
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from transformers import PreTrainedModel

from lightning_em import imports, lock, runs
from lightning_em.callbacks import Probing, refuse_idle_adapter, refuse_other_base
from lightning_em.config_args import load_yaml
from lightning_em.data import EMDataModule
from lightning_em.errors import ConfigError, explain_parsing
from lightning_em.models import BaseModel, with_shared_weights
from lightning_em.module import EMModule
from lightning_em.parsing import link_shared_keys
from lightning_em.probes import Probe
from lightning_em.runs import RunFolder


class LoadedRun(NamedTuple):
    """The parts of a run, with the adapter weights of one checkpoint loaded."""

    folder: RunFolder
    step: int
    module: EMModule
    data: EMDataModule


def rebuild_run(reference: str, allow_zero_adapter: bool = False) -> LoadedRun:
    """Rebuild a run from its config, on the device that `device_for` returns.

    Args:
        reference: Name of a run or checkpoint: `runs/x` for its newest valid checkpoint, `runs/x@step-40` for another.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.

    Raises:
        ValueError: If the run or checkpoint is missing or corrupt, the base model or the data differs from the run's,
            or the adapter changes nothing.
    """
    imports.restrict(imports.allowed())  # keeps the packages that --allow_import named
    folder, checkpoint = runs.locate(reference)
    if why := folder.changed_data():
        raise ValueError(f"{folder.path} cannot be measured on its own rows: {why}. Put the old data back.")
    loaded = load_module(folder, runs.step_of(checkpoint))
    loaded.data.setup("fit")
    loaded.module.to(device_for(folder))
    if not allow_zero_adapter:
        rows = [batch.to(loaded.module.device) for batch in loaded.data.probe_batches("narrow", 2, 2)]
        refuse_idle_adapter(loaded.module.model, rows, reference)
    return loaded


def device_for(folder: RunFolder) -> torch.device:
    """Choose the device for measurements on a run.

    This is a GPU if this machine has one, unless training ran on the CPU or sharded the base model over GPUs. A sharded
    base model may not fit on one GPU.
    """
    trainer = _config_of(folder).get("trainer") or {}
    on_one_gpu = trainer.get("accelerator") != "cpu" and "ShardedBase" not in str(trainer.get("strategy"))
    return torch.device("cuda" if on_one_gpu and torch.cuda.is_available() else "cpu")


def load_module(
    folder: RunFolder, step: int, bases: dict[BaseModel, PreTrainedModel] | None = None
) -> LoadedRun:
    """Rebuild a run at one checkpoint without reading its data files, which need not exist on this machine.

    Args:
        folder: Folder of the run.
        step: Step of the checkpoint.
        bases: Base models loaded so far, to which a missing one is added. Runs on the same base share its weights.

    Raises:
        ValueError: If the base model differs from the run's, or the adapter does not fit.
    """
    parts = _parts_of(folder)
    parts.model.init_from = None  # the checkpoint holds the weights, so the parent run need not exist
    if bases is None:
        parts.model.configure_model()
    else:
        base = parts.model.base
        if base not in bases:
            bases[base] = base.load_model()
        parts.model.configure_model(with_shared_weights(bases[base]))
    parts.model.model.adapter.load(folder.checkpoint(step))
    refuse_other_base(folder, parts.model)
    return LoadedRun(folder, step, parts.model, parts.data)


def _parts_of(folder: RunFolder) -> "Parts":
    """Create the model and data objects of a run from its config.

    Raises:
        ConfigError: If the config is not valid here, for example if it names a class that does not exist or may not be
            imported.
    """
    try:
        return instantiate(_config_of(folder))
    except ArgumentError as error:
        told = explain_parsing(str(error), ["--config", str(folder.config_file)], ())
        packages = folder.read_run().get("allowed_imports") or []
        flags = " ".join(f"--allow_import {name}" for name in packages)
        raise ConfigError(told + (f" This run was made with {flags}." if flags else "")) from error


def _config_of(folder: RunFolder) -> dict[str, Any]:
    text = folder.config_file.read_text(encoding="utf-8")
    config: dict[str, Any] = load_yaml(text, folder.config_file)
    return config


class Parts(NamedTuple):
    """Model and data of a config; weights and rows are not loaded."""

    model: EMModule
    data: EMDataModule


def instantiate(config: dict[str, Any]) -> Parts:
    """Create only the model and the data of a resolved config."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_lightning_class_args(EMModule, "model")
    parser.add_lightning_class_args(EMDataModule, "data")
    link_shared_keys(parser)
    made = parser.instantiate_classes(
        parser.parse_object({key: config[key] for key in ("seed_everything", "model", "data")})
    )
    return Parts(made.model, made.data)


def instantiate_probing(settings: dict[str, Any]) -> Probing:
    """Create the `Probing` callback of a config from its settings."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Probing, "probing")
    probing: Probing = parser.instantiate_classes(parser.parse_object({"probing": settings})).probing
    return probing


def probe_run(
    reference: str,
    probes: Sequence[Probe] | str | Path | None = None,
    num_examples: int | None = None,
    batch_size: int | None = None,
    allow_zero_adapter: bool = False,
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> int:
    """Run probes at all checkpoints of a run or at one; skip measurements that are already recorded.

    Args:
        reference: Name of a run or checkpoint: `runs/x` for all checkpoints, `runs/x@step-40` for one.
        probes: Probes or YAML file, as in `load_probing`.
        num_examples: Number of training rows of each stream, as in `load_probing`.
        batch_size: Number of rows in one forward pass, as in `load_probing`.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.
        track: Function that wraps the list of steps, for example to show progress.

    Returns:
        Number of new records.

    Raises:
        ValueError: If the run or its probes cannot be used.
    """
    folder = runs.locate(reference)[0]
    probing = load_probing(folder, probes, num_examples, batch_size)  # before the model is loaded
    loaded = rebuild_run(reference, allow_zero_adapter)
    measured = 0
    with lock.RunLock(folder.path, ["lightning-em", "probe", reference]):
        for step in track([loaded.step] if "@" in reference else folder.steps()):
            loaded.module.model.adapter.load(runs.locate(f"{folder.path}@step-{step}")[1])
            measured += probing.measure(folder, loaded.module.model, loaded.data, step)
    return measured


def load_probing(
    folder: RunFolder,
    probes: Sequence[Probe] | str | Path | None,
    num_examples: int | None = None,
    batch_size: int | None = None,
) -> Probing:
    """Create a `Probing` callback from probes, a YAML file, or the run's config.

    Args:
        folder: Folder of the run.
        probes: Probes, or a YAML file with the settings of `Probing`; the run's config if not given.
        num_examples: Number of training rows of each stream to measure on; overrides the file.
        batch_size: Number of rows in one forward pass; overrides the file.

    Raises:
        ValueError: If the file does not exist, names no probe, or has invalid settings.
    """
    flags = {"num_examples": num_examples, "batch_size": batch_size}
    given = {key: value for key, value in flags.items() if value is not None}
    if not isinstance(probes, str | Path | None):
        return Probing(list(probes), **given)
    file = Path(probes) if probes else folder.config_file
    settings = _mapping(file) if probes else _mapping(file).get("probing") or {}
    if not settings.get("probes"):
        raise ValueError(f"{file} names no probe; give --config configs/probing/curves.yaml.")
    settings |= given
    for key, flag in flags.items():
        if isinstance(value := settings.get(key), int) and value < 1:
            place = f"{key} of {file}" if flag is None else f"--{key}"
            raise ValueError(f"{place} must be at least 1, got {value}.")
    try:
        return instantiate_probing(settings)
    except ArgumentError as error:
        known = inspect.signature(Probing).parameters
        raise ConfigError(explain_parsing(str(error), ["--config", str(file)], known)) from error


def _mapping(file: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: If the file cannot be read, is not valid YAML, or does not hold a mapping.
    """
    try:
        content = load_yaml(file.read_text(encoding="utf-8"), file)
    except OSError as error:
        raise ValueError(f"cannot read {file.absolute()}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        came = "it is empty" if content is None else f"got {content!r}"
        raise ValueError(f"{file} must hold keys, as configs/probing/curves.yaml does; {came}.")
    return content
