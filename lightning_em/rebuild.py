"""Back from files to objects: a run with one of its checkpoints, an experiment's parts, a set of probes."""

import inspect
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lightning_em import imports, runs
from lightning_em.callbacks import Probing, refuse_idle_adapter, refuse_other_base
from lightning_em.cli import EMCLI, link_shared_keys
from lightning_em.data import EMDataModule
from lightning_em.errors import ConfigError, explain_parsing
from lightning_em.identity import run_folder
from lightning_em.logs import hush
from lightning_em.models import BaseModel
from lightning_em.module import EMModule
from lightning_em.runs import RunFolder


class LoadedRun(NamedTuple):
    """A run's parts, with the adapter of one checkpoint in place."""

    folder: RunFolder
    step: int
    module: EMModule
    data: EMDataModule


def load_run(reference: str, allow_zero_adapter: bool = False) -> LoadedRun:
    """Rebuild a run from its own config, on the device that `device_for` says.

    Args:
        reference: `runs/x` for its newest checkpoint, `runs/x@step-40` for another.
        allow_zero_adapter: Whether an adapter that changes no logit is let through.

    Raises:
        ValueError: If run or checkpoint are missing or broken, the base is not the run's own, or the adapter
            changes nothing.
    """
    imports.restrict(imports.allowed())  # keeps what --allow_import named
    folder, checkpoint = runs.locate(reference)
    loaded = load_module(folder, runs.step_of(checkpoint))
    loaded.data.setup("fit")
    loaded.module.to(device_for(folder))
    if not allow_zero_adapter:
        rows = [batch.to(loaded.module.device) for batch in loaded.data.probe_batches("narrow", 2, 2)]
        refuse_idle_adapter(loaded.module.model, rows, reference)
    return loaded


def device_for(folder: RunFolder) -> torch.device:
    """Where to measure on a run: a GPU if there is one here, and one held all of the base when it was trained."""
    trainer = yaml.safe_load(folder.config_file.read_text(encoding="utf-8")).get("trainer") or {}
    on_one_gpu = trainer.get("accelerator") != "cpu" and "ShardedBase" not in str(trainer.get("strategy"))
    return torch.device("cuda" if on_one_gpu and torch.cuda.is_available() else "cpu")


def load_module(folder: RunFolder, step: int) -> LoadedRun:
    """The same without reading the data, so that they need not be here.

    Raises:
        ValueError: If the base is not the run's own, or the adapter does not fit.
    """
    parts = _parts_of(folder)
    parts.model.init_from = None  # the checkpoint holds the weights
    parts.model.configure_model()
    parts.model.model.adapter.load(folder.checkpoint(step))
    refuse_other_base(folder, parts.model)
    return LoadedRun(folder, step, parts.model, parts.data)


def _parts_of(folder: RunFolder) -> "Parts":
    """Model and data of a run.

    Raises:
        ConfigError: If its config names what is not here, or may not be imported.
    """
    try:
        return instantiate(yaml.safe_load(folder.config_file.read_text(encoding="utf-8")))
    except ArgumentError as error:
        told = explain_parsing(str(error), ["--config", str(folder.config_file)], ())
        packages = folder.read_run().get("allowed_imports") or []
        flags = " ".join(f"--allow_import {name}" for name in packages)
        raise ConfigError(told + (f" This run was made with {flags}." if flags else "")) from error


class Parts(NamedTuple):
    """Model and data of a config, nothing loaded."""

    model: EMModule
    data: EMDataModule


def instantiate(config: dict[str, Any]) -> Parts:
    """Make the model and the data of a resolved config, and nothing else of it."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_lightning_class_args(EMModule, "model")
    parser.add_lightning_class_args(EMDataModule, "data")
    link_shared_keys(parser)
    made = parser.instantiate_classes(
        parser.parse_object({key: config[key] for key in ("seed_everything", "model", "data")})
    )
    return Parts(made.model, made.data)


class UnrunFit(EMCLI):
    """A `fit` that names its run and makes its parts, and then does not run.

    Args:
        words: Of the command line after `fit`, without `--allow_import`.

    Attributes:
        resolved: The whole config as plain values.

    Raises:
        ValueError: If the words or a config file cannot be used.
    """

    resolved: dict[str, Any]

    def __init__(self, words: Sequence[str]) -> None:
        imports.restrict(imports.allowed())  # keeps what --allow_import named
        hush()
        options = {"exit_on_error": False, "allow_abbrev": False}
        arguments, sys.argv = sys.argv, [sys.argv[0], "fit", *words]  # where an error says that a key stands
        try:
            super().__init__(
                EMModule,
                EMDataModule,
                args=["fit", *words],
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={"fit": options, **options},
            )
        finally:
            sys.argv = arguments

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """One verb: making the parsers of the others takes most of the time."""
        return {"fit": EMCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        """No lock is taken, and no folder is touched."""
        self.resolved = self._get_config()
        self.run = run_folder(self.resolved)

    def fit(self, model: EMModule, **kwargs: Any) -> None:
        """Do nothing."""


class _ParsedFit(UnrunFit):
    """Nothing is made either."""

    def instantiate_classes(self) -> None:
        pass

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def resolved_config(words: Sequence[str]) -> dict[str, Any]:
    """What `fit` with these words would run: the whole config as plain values, nothing loaded or made.

    Args:
        words: Of the command line after `fit`, without `--allow_import`.

    Raises:
        ValueError: If the words or a config file cannot be used.
    """
    return _ParsedFit(words).resolved


class ExperimentParts(NamedTuple):
    """What an experiment file names, nothing loaded."""

    base: BaseModel
    data: EMDataModule


def experiment_parts(config: str) -> ExperimentParts:
    """The base and the data of an experiment file, or of a run's config.yaml."""
    parsed = UnrunFit(["--config", config, "--trainer.accelerator", "cpu"])
    return ExperimentParts(parsed.model.base, parsed.datamodule)


def load_probing(
    folder: RunFolder, config: str | None, num_examples: int | None = None, batch_size: int | None = None
) -> Probing:
    """The probes of a YAML file, or of the run's own config.

    Args:
        folder: The run.
        config: YAML with the settings of `Probing`; the run's own if not given.
        num_examples: Instead of what `config` says.
        batch_size: Instead of what `config` says.

    Raises:
        ValueError: If there is no such file, it names no probe, or its settings cannot be used.
    """
    file = Path(config) if config else folder.config_file
    settings = _mapping(file) if config else _mapping(file).get("probing") or {}
    if not settings.get("probes"):
        raise ValueError(f"{file} names no probe; give --config configs/probing/curves.yaml.")
    flags = {"num_examples": num_examples, "batch_size": batch_size}
    settings |= {key: value for key, value in flags.items() if value is not None}
    for key, flag in flags.items():
        if isinstance(value := settings.get(key), int) and value < 1:
            place = f"{key} of {file}" if flag is None else f"--{key}"
            raise ValueError(f"{place} must be at least 1, got {value}.")
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(Probing, "probing")
    try:
        probing: Probing = parser.instantiate_classes(parser.parse_object({"probing": settings})).probing
    except ArgumentError as error:
        known = inspect.signature(Probing).parameters
        raise ConfigError(explain_parsing(str(error), ["--config", str(file)], known)) from error
    return probing


def _mapping(file: Path) -> dict[str, Any]:
    """Content of a YAML file.

    Raises:
        ValueError: If it is not there, no YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file.absolute()}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from None
    if not isinstance(content, dict):
        came = "it is empty" if content is None else f"got {content!r}"
        raise ValueError(f"{file} must hold keys, as configs/probing/curves.yaml does; {came}.")
    return content
