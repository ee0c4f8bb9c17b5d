"""LightningCLI for this project: one config, one run folder, the same command continues it."""

import hashlib
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_em import runs
from lightning_em.callbacks import AdapterCheckpoint, MetricsFile, Probing, Provenance
from lightning_em.checkpoints import FolderCheckpointIO
from lightning_em.data import EMDataModule
from lightning_em.module import EMModule
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

# Settings that say where and how a run is computed, not what it is; everything else names the run.
DEVICE_SETTINGS = {
    "trainer": {
        "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "default_root_dir", "plugins", "deterministic", "benchmark",
    },
    "data": {"num_workers"},
}  # fmt: skip
NOT_PART_OF_A_RUN = {"config", "run", "probing", "checkpoint", "ckpt_path", "weights_only"}
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's verbs and the arguments of the trainer that are not the user's to give."""
        ours = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
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
        self.run = run_folder(config)
        if self.subcommand != "fit":
            return
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
            plugins=[*(given.get("plugins") or []), FolderCheckpointIO()],
            default_root_dir=str(self.run.path) if fitting else given.get("default_root_dir"),
            **kwargs,
        )
        if fitting:
            text = yaml.safe_dump({k: v for k, v in config.items() if k != "config"}, sort_keys=False)
            trainer.callbacks.insert(0, Provenance(identity_of(config), text))  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: EMModule, **kwargs: Any) -> None:
        """Start the run, or continue it from its newest valid checkpoint."""
        resume = self._get(self.config_init, "run").resume
        record, step = self.run.read_run(), self.run.newest_valid_step()
        if record.get("status") == "finished" and resume != "never":
            logger.warning("%s is finished (step %s): nothing to do.", self.run.path, record.get("last_step"))
            return
        if resume == "must" and step is None:
            raise ValueError(
                f"--run.resume must, but {self.run.path} has no valid checkpoint to continue from."
            )
        if resume == "never" and (step is not None or record):
            raise ValueError(
                f"--run.resume never, but {self.run.path} has a run already; give another --run.name."
            )
        if step is not None:
            logger.info("continuing %s from step %d", self.run.path, step)
        for log in self.trainer.loggers:
            if isinstance(log, MetricsFile):
                log.rewind(step or 0)
        checkpoint = None if step is None else str(self.run.checkpoint(step))
        self.trainer.fit(model, ckpt_path=checkpoint, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "fit" and kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = str(runs.locate(str(kwargs["ckpt_path"]))[1])
        return kwargs


def link_shared_keys(parser: LightningArgumentParser) -> None:
    """One fact, one key: the tokenizer is the base's, every seed is `seed_everything`."""
    parser.link_arguments("model.base", "data.base", apply_on="instantiate")
    parser.link_arguments("seed_everything", "model.seed")
    parser.link_arguments("seed_everything", "data.seed")


class LoadedRun(NamedTuple):
    """A run's parts, with the adapter of one checkpoint in place."""

    folder: RunFolder
    step: int
    module: EMModule
    data: EMDataModule


def load_run(reference: str) -> LoadedRun:
    """Rebuild a run from its own config.

    Args:
        reference: `runs/x` for its newest checkpoint, `runs/x@step-40` for another.

    Raises:
        ValueError: If run or checkpoint are missing or broken.
    """
    folder, checkpoint = runs.locate(reference)
    parser = LightningArgumentParser()
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_lightning_class_args(EMModule, "model")
    parser.add_lightning_class_args(EMDataModule, "data")
    link_shared_keys(parser)
    config = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))
    parts = parser.instantiate_classes(
        parser.parse_object({key: config[key] for key in ("seed_everything", "model", "data")})
    )
    parts.model.init_from = None  # the checkpoint holds the weights
    parts.model.configure_model()
    parts.model.model.adapter.load(checkpoint)
    parts.data.setup("fit")
    return LoadedRun(folder, runs.step_of(checkpoint), parts.model, parts.data)


def load_probing(folder: RunFolder, config: str | None, num_examples: int, batch_size: int) -> Probing:
    """The probes of a YAML file, or of the run's own config.

    Args:
        folder: The run.
        config: YAML with the settings of `Probing`; the run's own if not given.
        num_examples: Used where `config` says nothing.
        batch_size: Used where `config` says nothing.

    Raises:
        ValueError: If neither names a probe.
    """
    if config is None:
        settings = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))["probing"]
    else:
        settings = {"num_examples": num_examples, "batch_size": batch_size}
        settings |= yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not settings.get("probes"):
        raise ValueError(
            f"{config or folder.config_file} names no probe; give --config configs/probing/curves.yaml."
        )
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Probing, "probing")
    probing: Probing = parser.instantiate_classes(parser.parse_object({"probing": settings})).probing
    return probing


def run_folder(config: dict[str, Any]) -> RunFolder:
    """The run's folder: named, or the first config file's name and the hash of what the run is."""
    options = config["run"]
    files = config.get("config") or []
    experiment = Path(files[0]).stem if files else "run"
    return RunFolder(Path(options["root"]) / (options["name"] or f"{experiment}-{identity_of(config)}"))


def what_a_run_is(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result."""
    kept: dict[str, Any] = {}
    for group, value in config.items():
        if group in NOT_PART_OF_A_RUN:
            continue
        drop = DEVICE_SETTINGS.get(group, set())
        kept[group] = {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
    return kept


def identity_of(config: dict[str, Any]) -> str:
    """Eight hexadecimal characters that stand for the config without device settings."""
    text = json.dumps(what_a_run_is(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf that differs between two configs."""
    old, new = _leaves(what_a_run_is(before)), _leaves(what_a_run_is(now))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix.rstrip("."): config}
    return {k: v for name, value in config.items() for k, v in _leaves(value, f"{prefix}{name}.").items()}


def _usage(verb: str, description: str) -> dict[str, Any]:
    return {
        "usage": f"lightning-em {verb} --config FILE [--config FILE ...] [--KEY VALUE ...]",
        "description": description,
    }


def main(words: list[str]) -> int:
    """Run fit, validate, test or predict with these words of the command line."""
    sys.argv = [sys.argv[0], *words]  # DDP starts its other ranks by this command line
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    warnings.filterwarnings("ignore", message=".*`LightningCLI's args parameter.*")
    EMCLI(
        EMModule,
        EMDataModule,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={verb: _usage(verb, text) for verb, text in DESCRIPTIONS.items()}
        | {"prog": "lightning-em"},
    )
    return 0
