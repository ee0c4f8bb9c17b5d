"""Parser of an experiment: resolves config files and options, and instantiates the resolved config."""

import os
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import Namespace, _typehints
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from lightning_em.callbacks import AdapterCheckpoint, Probing
from lightning_em.config_args import ordered, refuse_repeated_keys
from lightning_em.data import EMDataModule
from lightning_em.errors import EVERYWHERE, ConfigError, explain_parsing
from lightning_em.module import EMModule
from lightning_em.progress import Progress

Subcommand = Literal["fit", "validate", "test", "predict"]

TRAINER_DEFAULTS = {
    "devices": 1,
    "use_distributed_sampler": False,  # our sampler splits rows over the ranks itself, and resumes at its position
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "logger": False,  # metrics.csv is always written; a logger in the config is used in addition
}

DESCRIPTIONS: Mapping[Subcommand, str] = {
    "fit": "Train an adapter with CE on narrow data + KL on parallel data; the same command continues an "
    "unfinished run. An experiment file says what to run; flags and further --config files vary it, e.g. "
    "--model.objective.kl_weight 3, --data.narrow.limit 100, --trainer configs/trainer/gpu1.yaml. Everything about "
    "the run ends up in its folder under --run.root.",
    "validate": "Measure CE on held-out narrow rows and KL on held-out parallel rows: "
    "--config runs/x/config.yaml --ckpt_path runs/x (or runs/x@step-40).",
    "test": "The same as validate, logged as test/ce and test/kl.",
    "predict": "Answer held-out questions with a run's adapter: --config runs/x/config.yaml --ckpt_path runs/x.",
}
# Arguments of the trainer's methods that are not command-line options.
_NOT_OPTIONS = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
_NOT_OPTIONS |= {"verbose", "return_predictions"}


@dataclass
class RunOptions:
    """Folder of a run, and what to do if the run exists already.

    Attributes:
        name: Name of the folder; the first config file's name and eight characters of the config's hash if not given.
        root: Folder of all runs.
        resume: `auto` continues an unfinished run, `must` refuses to start a new one, `never` refuses to continue one.
    """

    name: str | None = None
    root: str = "runs"
    resume: Literal["auto", "never", "must"] = "auto"


class Made(NamedTuple):
    """Module, data module and trainer made from a config."""

    module: EMModule
    data: EMDataModule
    trainer: Trainer


@contextmanager
def _new_class_without_old_init_args() -> Iterator[None]:
    """Let a new `class_path` discard all init_args of the class that it replaces.

    jsonargparse 4.53 discards only those that the new class does not have, so that an adapter would get the `alpha` of
    the adapter of an earlier config file in silence.
    """

    def discard(_: Any, previous: Any, value: Any) -> None:
        if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
            previous["init_args"] = Namespace()  # type: ignore[no-untyped-call]

    original = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original


class ExperimentParser(LightningCLI):
    """LightningCLI's parser for one subcommand. It only parses; `make` instantiates, and the caller runs the trainer.

    Args:
        subcommand: Subcommand whose options are parsed.
        args: Command-line arguments after the subcommand, without `--allow_import`.

    Attributes:
        resolved: Whole config as plain values.

    Raises:
        ValueError: If an argument or a config file is not valid.
        SystemExit: After `--help` and `--print_config`.
    """

    def __init__(self, subcommand: Subcommand, args: Sequence[str]) -> None:
        self._only = subcommand
        refuse_repeated_keys(args)
        args = ordered(args)
        usage = {
            "usage": f"lightning-em {subcommand} --config FILE [--config FILE ...] [--KEY VALUE ...]",
            "description": f"{DESCRIPTIONS[subcommand]} {EVERYWHERE}",
        }
        options = {"exit_on_error": False, "allow_abbrev": False}
        try:
            with _new_class_without_old_init_args():
                super().__init__(
                    EMModule,
                    EMDataModule,
                    args=[subcommand, *args],
                    save_config_callback=None,
                    seed_everything_default=0,
                    auto_configure_optimizers=False,
                    parser_kwargs={subcommand: usage | options, "prog": "lightning-em", **options},
                )
        except ArgumentError as error:
            parser = self._subcommand_parsers[subcommand]
            keys = list(parser.get_defaults().keys())
            raise ConfigError(explain_parsing(str(error), args, keys)) from error
        chosen = self.config[subcommand]
        text = self._parser(subcommand).dump(chosen, skip_link_targets=True, skip_none=False, format="yaml")
        self.resolved: dict[str, Any] = yaml.safe_load(text)
        self.resolved["config"] = [str(path) for path in chosen.get("config") or []]

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The requested subcommand only: building the parsers of the others would take most of the time."""
        return {self._only: _NOT_OPTIONS | ({"ckpt_path"} if self._only == "fit" else set())}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups of options in the order of `--help`, and link the keys that share a value."""
        parser.add_lightning_class_args(EMModule, "model")
        parser.add_lightning_class_args(EMDataModule, "data")
        link_shared_keys(parser)
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Probing, "probing")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def make(
        self,
        first_callbacks: Sequence[Callback],
        loggers: Sequence[Logger],
        plugins: Sequence[Any],
        root: str | None,
    ) -> Made:
        """Instantiate module, data module and trainer.

        Args:
            first_callbacks: Callbacks that run before those of the config.
            loggers: Loggers in addition to those of the config.
            plugins: Plugins of the trainer in addition to those of the config.
            root: Default root folder of the trainer; that of the config if not given.
        """
        self.config_init = self.parser.instantiate_classes(self.config)
        given = self._get(self.config_init, "trainer", default={})
        has_own_bar = any(isinstance(callback, ProgressBar) for callback in _as_list(given.get("callbacks")))
        shows_progress = any(isinstance(callback, Progress) for callback in first_callbacks)
        without_bar = {"enable_progress_bar": False} if shows_progress and not has_own_bar else {}
        # LightningCLI also gives the trainer the callbacks that have options of their own, `checkpoint` and `probing`.
        trainer = self.instantiate_trainer(
            **without_bar,
            logger=[*_as_list(given.get("logger")), *loggers] or False,
            plugins=[*(given.get("plugins") or []), *plugins],
            default_root_dir=root or given.get("default_root_dir"),
        )
        trainer.callbacks[:0] = first_callbacks  # type: ignore[attr-defined]
        return Made(self._get(self.config_init, "model"), self._get(self.config_init, "data"), trainer)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, without LightningCLI's warning if this process has arguments of its own."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Do nothing; `make` instantiates the config later."""

    def _parse_ckpt_path(self) -> None:
        # LightningCLI 2.6 lets hyper-parameters in a checkpoint override the user's config silently.
        pass

    def _set_seed(self) -> None:
        # `Experiment` seeds before each run. `true` means the number below, as in Lightning 2.6's
        # seed_everything(None).
        if self._get(self.config, "seed_everything") is True:
            self.config[self._only]["seed_everything"] = int(os.environ.get("PL_GLOBAL_SEED", "0"))

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            text = "Evaluate an adapter that changes nothing."
            parser.add_argument("--allow_zero_adapter", type=bool, default=False, help=text)
        return parser


def _as_list(value: Any) -> list[Any]:
    """Return a setting of the trainer that is one object, several, or none, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def link_shared_keys(parser: LightningArgumentParser) -> None:
    """Link the keys that share a value: the tokenizer is the base model's, and every seed is `seed_everything`."""
    parser.link_arguments("model.base", "data.base", apply_on="instantiate")
    parser.link_arguments("seed_everything", "model.seed")
    parser.link_arguments("seed_everything", "data.seed")
