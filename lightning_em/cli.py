"""LightningCLI for this project: one config, one run folder, the same command continues it."""

import contextlib
import json
import logging
import sys
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from lightning_em import imports, launch, lock, runs, slurm
from lightning_em.callbacks import (
    AdapterCheckpoint,
    Health,
    LoadingCheck,
    MetricsFile,
    Probing,
    Provenance,
    Signals,
    follow_parent,
)
from lightning_em.checkpoints import FolderCheckpointIO
from lightning_em.data import EMDataModule
from lightning_em.errors import EVERYWHERE, ConfigError, explain_parsing
from lightning_em.identity import changed_keys, identity_of, run_folder
from lightning_em.logs import console_log, hush
from lightning_em.manifest import remove_leftovers, write_atomically
from lightning_em.module import EMModule
from lightning_em.progress import LogProgress
from lightning_em.redaction import redacted

logger = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "devices": 1,
    "use_distributed_sampler": False,  # our sampler knows ranks and position
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "logger": False,  # metrics.csv is always written; name a logger to have it beside
}

DESCRIPTIONS = {
    "fit": "Train an adapter with CE on narrow data + KL on parallel data; the same command continues an "
    "unfinished run. An experiment file says what to run; flags and further --config files vary it, e.g. "
    "--model.objective.kl_weight 3, --data.narrow.limit 100, --trainer configs/trainer/gpu1.yaml. Everything about "
    "the run ends up in its folder under --run.root.",
    "validate": "Measure CE on held-out narrow rows and KL on held-out parallel rows: "
    "--config runs/x/config.yaml --ckpt_path runs/x (or runs/x@step-40).",
    "test": "The same as validate, logged as test/ce and test/kl.",
    "predict": "Answer held-out questions with a run's adapter: --config runs/x/config.yaml --ckpt_path runs/x.",
}


@dataclass
class RunOptions:
    """Where a run lives and what to do if it is there already.

    Attributes:
        name: Folder name; the first config's name and eight characters of the config's hash if not given.
        root: Folder of all runs.
        resume: `auto` continues an unfinished run, `must` refuses to start a new one, `never` to continue one.
    """

    name: str | None = None
    root: str = "runs"
    resume: Literal["auto", "never", "must"] = "auto"


class EMCLI(LightningCLI):
    """fit, validate, test and predict over run folders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as self.held:
            try:
                super().__init__(*args, **kwargs)
            except ArgumentError as error:
                keys = [
                    key
                    for parser in self._subcommand_parsers.values()
                    for key in parser.get_defaults().keys()  # noqa: SIM118 (a Namespace, whose keys are dotted)
                ]
                raise ConfigError(explain_parsing(str(error), sys.argv[1:], keys)) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's verbs and the arguments of the trainer that are not the user's to give."""
        ours = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
        ours |= {"verbose", "return_predictions"}
        return {"fit": ours | {"ckpt_path"}, "validate": ours, "test": ours, "predict": ours}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run is first, how it is computed last; links keep one fact in one key."""
        parser.add_lightning_class_args(EMModule, "model")
        parser.add_lightning_class_args(EMDataModule, "data")
        link_shared_keys(parser)
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Probing, "probing")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})

    def _parse_ckpt_path(self) -> None:
        # Lightning's own lets hyper-parameters in a checkpoint override the user's config in silence
        pass

    def before_instantiate_classes(self) -> None:
        """Name the run and refuse a folder that holds another one."""
        config = self._get_config()
        launch.refuse_settings(config["trainer"])
        launch.refuse_task_count(config["trainer"])
        self.run = run_folder(config)
        if self.subcommand != "fit":
            return
        if lock.is_first_rank():
            self.held.enter_context(lock.RunLock(self.run.path, sys.argv))
            for folder in (self.run.path, self.run.checkpoints):
                remove_leftovers(folder)
            self.held.enter_context(console_log(self.run.console_log))
        known = self.run.read_run().get("identity")
        if known is not None and known != identity_of(config):
            changed = changed_keys(yaml.safe_load(self.run.config_file.read_text(encoding="utf-8")), config)
            raise ValueError(
                f"{self.run.path} holds a run with another config; different: {', '.join(changed)}. "
                "Give this one another --run.name, or leave the name out."
            )

    def _get_config(self) -> dict[str, Any]:
        """The resolved config of the verb as plain values."""
        parser = self._parser(self.subcommand)
        chosen = self.config[self.subcommand]
        text = parser.dump(chosen, skip_link_targets=True, skip_none=False, format="yaml")
        config: dict[str, Any] = yaml.safe_load(text)
        config["config"] = [str(path) for path in chosen.get("config") or []]
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: its folder, its checkpoint format, its records."""
        config = self._get_config()
        given = self._get(self.config_init, "trainer", default={})
        fitting = self.subcommand == "fit"
        loggers = given.get("logger") or []
        loggers = list(loggers) if isinstance(loggers, list | tuple) else [loggers]
        if fitting:
            loggers.append(MetricsFile(self.run.metrics_file))
        trainer = super().instantiate_trainer(
            logger=loggers or False,
            plugins=[*(given.get("plugins") or []), *self._environment(), FolderCheckpointIO()],
            default_root_dir=str(self.run.path) if fitting else given.get("default_root_dir"),
            **kwargs,
        )
        if fitting:
            text = yaml.safe_dump(
                redacted({k: v for k, v in config.items() if k != "config"}), sort_keys=False
            )
            first = [Provenance(identity_of(config), text), Health(), Signals(), LogProgress()]
        elif checkpoint := config.get("ckpt_path"):
            first = [LoadingCheck(runs.locate(checkpoint)[1], bool(config["allow_zero_adapter"]))]
        else:
            first = []
        trainer.callbacks[:0] = first  # type: ignore[attr-defined]
        return trainer

    @staticmethod
    def _environment() -> list[SLURMEnvironment]:
        """Lightning's own Slurm environment without its signal handlers: ours save and requeue."""
        by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        return [SLURMEnvironment(auto_requeue=False)] if by_srun else []

    def fit(self, model: EMModule, **kwargs: Any) -> None:
        """Start the run, or continue it from its newest valid checkpoint."""
        resume = self._get(self.config_init, "run").resume
        record, step = self.run.read_run(), self.run.newest_valid_step()
        if record.get("status") == "finished" and resume != "never":
            logger.warning("%s is finished (step %s): nothing to do.", self.run.path, record.get("last_step"))
            return
        if record.get("status") == "imported":
            raise ValueError(
                f"{self.run.path} was imported: there is no training to continue. Start another run from its adapter "
                f"with --model.init_from {self.run.path}."
            )
        if resume == "must" and step is None:
            raise ValueError(
                f"--run.resume must, but {self.run.path} has no valid checkpoint to continue from."
            )
        if resume == "never" and (step is not None or record.get("attempts")):  # a queued job is no attempt
            raise ValueError(
                f"--run.resume never, but {self.run.path} has a run already; give another --run.name."
            )
        if step is None:
            _refuse_missing_start(model.init_from)
        else:
            logger.info("continuing %s from step %d", self.run.path, step)
        for log in self.trainer.loggers:
            if isinstance(log, MetricsFile):
                log.rewind(step or 0)
        checkpoint = None if step is None else str(self.run.checkpoint(step))
        self.trainer.fit(model, ckpt_path=checkpoint, **kwargs)

    def validate(self, model: EMModule, **kwargs: Any) -> None:
        """Measure on held-out rows and show it."""
        self.trainer.validate(model, verbose=False, **kwargs)
        self._show(kwargs.get("ckpt_path"))

    def test(self, model: EMModule, **kwargs: Any) -> None:
        """Measure on test rows and show it."""
        self.trainer.test(model, verbose=False, **kwargs)
        self._show(kwargs.get("ckpt_path"))

    def _show(self, checkpoint: str | None) -> None:
        table = Table("quantity", "nats per token", title=checkpoint or "untrained adapter")
        for name, value in sorted(self.trainer.callback_metrics.items()):
            table.add_row(name, f"{value.item():.6f}")
        if self.trainer.is_global_zero:
            Console().print(table)

    def predict(self, model: EMModule, **kwargs: Any) -> None:
        """Sample answers and write them beside the run they come from."""
        if self.trainer.world_size > 1:
            raise ValueError("predict runs in one process: set trainer.devices and trainer.num_nodes to 1.")
        answers = self.trainer.predict(model, return_predictions=True, **kwargs)
        checkpoint = Path(kwargs["ckpt_path"]) if kwargs.get("ckpt_path") else None
        folder = checkpoint.parent.parent if checkpoint else self.run.path
        target = folder / "behaviour" / f"answers-{checkpoint.name if checkpoint else 'untrained'}.jsonl"
        rows = [json.dumps(row, ensure_ascii=False) for batch in answers or [] for row in batch]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, "".join(f"{row}\n" for row in rows))
        logger.info("%d prompts answered: %s", len(rows), target)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            text = "Evaluate an adapter that changes nothing."
            parser.add_argument("--allow_zero_adapter", type=bool, default=False, help=text)
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "fit" and kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = str(runs.locate(str(kwargs["ckpt_path"]))[1])
        return kwargs


def _refuse_missing_start(init_from: str | None) -> None:
    """Look for the run that another starts from before data and base are read."""
    try:
        if init_from is not None:
            runs.locate(init_from)
    except ValueError as error:
        raise ValueError(
            f"model.init_from is {init_from}, but {error} Fit that run first, or name another: lightning-em runs ls."
        ) from None


def link_shared_keys(parser: LightningArgumentParser) -> None:
    """One fact, one key: the tokenizer is the base's, every seed is `seed_everything`."""
    parser.link_arguments("model.base", "data.base", apply_on="instantiate")
    parser.link_arguments("seed_everything", "model.seed")
    parser.link_arguments("seed_everything", "data.seed")


def _usage(verb: str, description: str) -> dict[str, Any]:
    return {
        "usage": f"lightning-em {verb} --config FILE [--config FILE ...] [--KEY VALUE ...]",
        "description": f"{description} {EVERYWHERE}",
        "exit_on_error": False,
        "allow_abbrev": False,
    }


def main(words: list[str]) -> int:
    """Run fit, validate, test or predict with these words of the command line."""
    run_cli(words)
    return 0


def run_cli(words: list[str]) -> EMCLI:
    """The same for a caller in this process, who wants to know the run."""
    sys.argv = [sys.argv[0], *words]  # DDP starts its other ranks by this command line
    if words[0] == "fit":
        slurm.note_requeue_signal()  # for callers that do not come by __main__
    first = lock.is_first_rank()
    if not first:
        follow_parent()
    # what every rank would say alike is said once
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level, stream=sys.stderr)
    hush()
    return EMCLI(
        EMModule,
        EMDataModule,
        args=imports.take(words),
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={verb: _usage(verb, text) for verb, text in DESCRIPTIONS.items()}
        | {"prog": "lightning-em", "exit_on_error": False, "allow_abbrev": False},
    )
