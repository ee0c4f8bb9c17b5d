"""Experiments in Python: resolve config files and overrides, then fit, evaluate, predict or probe the run."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from lightning import seed_everything
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import distributed

from lightning_em import imports, lock, preflight, runs, slurm
from lightning_em.callbacks import (
    Health,
    LoadingCheck,
    MetricsFile,
    Provenance,
    Signals,
    Summary,
    closing,
    follow_parent,
)
from lightning_em.checkpoints import FolderCheckpointIO
from lightning_em.data import EMDataModule
from lightning_em.errors import ConfigError, explain_misconfiguration
from lightning_em.identity import identity_of, run_folder
from lightning_em.logs import console_log, filter_expected_messages
from lightning_em.manifest import remove_leftovers, write_atomically
from lightning_em.module import EMModule
from lightning_em.parsing import ExperimentParser, Made, Subcommand
from lightning_em.probes import Probe
from lightning_em.progress import Progress
from lightning_em.rebuild import Parts, instantiate, probe_run
from lightning_em.recorded import RecordedRun
from lightning_em.redaction import redacted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Experiment:
    """A run, described by config files and options.

    The command line, studies and notebooks all use this class, so that the same description gives the same folder,
    name, config.yaml and results, to the last bit. The constructor resolves the config; nothing is loaded or written
    until a method is called.

    Args:
        args: Command-line arguments after the subcommand.
        subcommand: Subcommand that the arguments belong to.

    Attributes:
        args: Command-line arguments after the subcommand.
        config: Resolved config as plain values.
        folder: Folder of the run; it need not exist yet.
        trainer: Trainer of the last `fit`, `validate`, `test` or `predict`; None before the first.

    Raises:
        ValueError: If an argument or a config file is not valid; the message names the key.
    """

    def __init__(self, args: Sequence[str], subcommand: Subcommand = "fit") -> None:
        names, rest = imports.split(args)
        imports.restrict([*imports.allowed(), *names])
        filter_expected_messages()
        self.args, self.subcommand = list(args), subcommand
        self._parser = ExperimentParser(subcommand, rest)
        self.config = self._parser.resolved
        self.folder = run_folder(self.config)
        self.trainer: Trainer | None = None

    @classmethod
    def from_yaml(
        cls,
        files: str | Path | Sequence[str | Path],
        overrides: Mapping[str, Any] | None = None,
        allow_import: Sequence[str] = (),
    ) -> "Experiment":
        """Make an experiment from YAML files and overrides, as `lightning-em fit --config FILE --KEY VALUE` does.

        Args:
            files: Config files; later files override earlier ones. References in a file are relative to that file.
            overrides: Values by dotted key, such as `{"model.objective.kl_weight": 3}`. A string is parsed as on the
                command line, where it may name a YAML file.
            allow_import: Packages, in addition to this one, whose classes the config may name.

        Raises:
            ValueError: If a file or an override is not valid.
        """
        names = [files] if isinstance(files, str | Path) else files
        args = [f"--config={file}" for file in names]
        args += as_options(overrides or {})
        return cls([*args, *(f"--allow_import={name}" for name in allow_import)])

    def __repr__(self) -> str:
        return f"Experiment({str(self.folder.path)!r})"

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.folder.path.name

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the run; see `identity_of`."""
        return identity_of(self.config)

    @property
    def config_text(self) -> str:
        """Resolved config as YAML without secrets, as in the run's config.yaml."""
        kept = {key: value for key, value in self.config.items() if key != "config"}
        return yaml.safe_dump(redacted(kept), sort_keys=False)

    @cached_property
    def _parts(self) -> Parts:
        return instantiate(self.config)

    @property
    def module(self) -> EMModule:
        """The LightningModule; it has weights after a fit or an evaluation."""
        return self._parts.model

    @property
    def data(self) -> EMDataModule:
        """The data module."""
        return self._parts.data

    @property
    def command(self) -> list[str]:
        """The equivalent command line."""
        return ["lightning-em", self.subcommand, *self.args]

    def fit(self) -> RecordedRun:
        """Start the run, or continue it from its newest valid checkpoint. A finished run is not repeated.

        Returns:
            The recorded run.

        Raises:
            ValueError: If a setting is not valid, the KL has a weight but no data, or the folder is in use or holds
                another run.
        """
        self._refuse_settings()
        preflight.refuse_missing_kl_data(self.config)
        slurm.note_requeue_signal()
        with contextlib.ExitStack() as held:
            held.enter_context(self._in_this_process())
            # The first rank holds the lock for all ranks of the job.
            if lock.is_first_rank():
                held.enter_context(lock.RunLock(self.folder.path, self.command))
                for folder in (self.folder.path, self.folder.checkpoints):
                    remove_leftovers(folder)
                held.enter_context(console_log(self.folder.console_log))
            self.refuse_other_run()
            self._fit()
        return RecordedRun(self.folder, self.folder.newest_valid_step())

    def refuse_other_run(self) -> None:
        """Check that the folder, if it holds a run, holds this one.

        Raises:
            ValueError: If the folder holds another run; the message names what differs.
        """
        if self.folder.run_file.exists():
            self.folder.refuse_other(self.folder.difference(self.identity))

    def validate(self, checkpoint: str | None = None, allow_zero_adapter: bool = False) -> dict[str, float]:
        """Measure CE and KL on held-out rows.

        Args:
            checkpoint: `runs/x` or `runs/x@step-40`; the newest valid checkpoint of this run if not given.
            allow_zero_adapter: Whether to accept an adapter that changes no logit.

        Returns:
            Metrics by name, in nats per token.

        Raises:
            ValueError: If the checkpoint does not exist, or belongs to another base model.
        """
        return self.evaluate("validate", checkpoint or str(self.folder.path), allow_zero_adapter)

    def test(self, checkpoint: str | None = None, allow_zero_adapter: bool = False) -> dict[str, float]:
        """Measure CE and KL on test rows; see `validate`."""
        return self.evaluate("test", checkpoint or str(self.folder.path), allow_zero_adapter)

    def evaluate(
        self, stage: Subcommand, checkpoint: str | None, allow_zero_adapter: bool = False
    ) -> dict[str, float]:
        """Run `validate` or `test` on a checkpoint; on the untrained adapter if `checkpoint` is None."""
        with self._in_this_process():
            made, path = self._make_evaluation(checkpoint, allow_zero_adapter)
            run = made.trainer.validate if stage == "validate" else made.trainer.test
            run(made.module, datamodule=made.data, ckpt_path=path, verbose=False)
        return {name: value.item() for name, value in made.trainer.callback_metrics.items()}

    def predict(self, checkpoint: str | None, allow_zero_adapter: bool = False) -> Path:
        """Sample answers, and write them to `behaviour` in the folder of the checkpoint's run.

        Args:
            checkpoint: `runs/x` or `runs/x@step-40`; None for the untrained adapter.
            allow_zero_adapter: Whether to accept an adapter that changes no logit.

        Returns:
            Path of the JSONL file.

        Raises:
            ValueError: If the trainer has more than one process, or the checkpoint does not exist.
        """
        with self._in_this_process():
            made, path = self._make_evaluation(checkpoint, allow_zero_adapter)
            if made.trainer.world_size > 1:
                raise ValueError(
                    "predict runs in one process: set trainer.devices and trainer.num_nodes to 1."
                )
            answers = made.trainer.predict(made.module, made.data, return_predictions=True, ckpt_path=path)
        folder = Path(path).parent.parent if path else self.folder.path
        target = folder / "behaviour" / f"answers-{Path(path).name if path else 'untrained'}.jsonl"
        questions = {row.id: row.prompt for row in made.data.held_out_questions()}
        rows = [
            json.dumps({"question": questions[row["row_id"]], **row}, ensure_ascii=False)
            for batch in answers or []
            for row in batch
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, "".join(f"{row}\n" for row in rows))
        logger.info("%d prompts answered: %s", len(rows), target)
        return target

    def probe(
        self,
        probes: Sequence[Probe] | str | Path | None = None,
        num_examples: int | None = None,
        batch_size: int | None = None,
        allow_zero_adapter: bool = False,
    ) -> int:
        """Run probes at every checkpoint of the run; skips measurements that are on record.

        Args:
            probes: Probes, or a YAML file with `probes:`; those of the run's config if not given.
            num_examples: Number of training rows of each stream to measure on.
            batch_size: Number of rows in one forward pass.
            allow_zero_adapter: Whether to accept an adapter that changes no logit.

        Returns:
            Number of new records.

        Raises:
            ValueError: If the folder holds another run.
        """
        self.refuse_other_run()
        return probe_run(str(self.folder.path), probes, num_examples, batch_size, allow_zero_adapter)

    def _refuse_settings(self) -> None:
        preflight.refuse_settings(self.config["trainer"])
        preflight.refuse_task_count(self.config["trainer"])

    def _fit(self) -> None:
        resume = self.config["run"]["resume"]
        record, step, path = self.folder.read_run(), self.folder.newest_valid_step(), self.folder.path
        if record.get("status") == "finished" and resume != "never":
            logger.warning("%s is finished (step %s): nothing to do.", path, record.get("last_step"))
            logger.info("%s", closing(self.folder)[0])
            return
        if record.get("status") == "imported":
            raise ValueError(
                f"{path} was imported: there is no training to continue. Start another run from its adapter "
                f"with --model.init_from {path}."
            )
        if resume == "must" and step is None:
            raise ValueError(f"--run.resume must, but {path} has no valid checkpoint to continue from.")
        # A queued job is recorded in run.json before its first attempt.
        if resume == "never" and (step is not None or record.get("attempts")):
            raise ValueError(f"--run.resume never, but {path} has a run already; give another --run.name.")
        if step is None:
            _refuse_missing_start(self.config["model"]["init_from"])
        else:
            logger.info("continuing %s from step %d", path, step)
        metrics = MetricsFile(self.folder.metrics_file)
        first = [
            Provenance(self.identity, self.config_text, self.command),
            Summary(),
            Health(),
            Signals(),
            Progress(bar=self.config["trainer"]["enable_progress_bar"] is not False),
        ]
        made = self._make(first, [metrics], str(path))
        metrics.rewind(step or 0)  # the steps after the checkpoint are repeated and logged again
        checkpoint = None if step is None else str(self.folder.checkpoint(step))
        made.trainer.fit(made.module, datamodule=made.data, ckpt_path=checkpoint)
        if made.trainer.is_global_zero:
            text, warnings = closing(self.folder)
            self.folder.update_run(warnings=warnings)
            logger.info("%s", text)
            for warning in warnings:
                logger.warning("warning: %s", warning)

    def _make_evaluation(self, checkpoint: str | None, allow_zero_adapter: bool) -> tuple[Made, str | None]:
        self._refuse_settings()
        path = runs.locate(checkpoint)[1] if checkpoint else None
        made = self._make([LoadingCheck(path, allow_zero_adapter)] if path else [])
        return made, str(path) if path else None

    def _make(
        self, first_callbacks: Sequence[Callback], loggers: Sequence[Logger] = (), root: str | None = None
    ) -> Made:
        if (seed := self.config["seed_everything"]) is not False:
            seed_everything(seed, workers=True)
        made = self._parser.make(first_callbacks, loggers, [*slurm_environment(), FolderCheckpointIO()], root)
        # Assigning to a cached_property replaces its value, so `module` and `data` are those of the last trainer.
        self.trainer, self._parts = made.trainer, Parts(made.module, made.data)
        return made

    @contextlib.contextmanager
    def _in_this_process(self) -> Iterator[None]:
        """Prepare this process for Lightning, and restore argv, environment and signal handlers afterwards.

        Lightning 2.6 starts every further rank of DDP by running the program of this process again with `sys.argv`
        (`_SubprocessScriptLauncher`). In a notebook or a study that program is not ours, so it is replaced with the
        command of this experiment.

        The launcher also sets LOCAL_RANK, WORLD_SIZE and MASTER_PORT in `os.environ`. A second fit in this process
        would find LOCAL_RANK and take itself for a rank that an external launcher had started, so the environment is
        restored.
        """
        if not lock.is_first_rank():
            follow_parent()  # otherwise a rank would outlive a killed first rank
        main, environment = sys.modules["__main__"], dict(os.environ)
        argv, spec = sys.argv, getattr(main, "__spec__", None)
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        is_grouped = distributed.is_initialized()
        if Path(argv[0]).name == "lightning-em" or getattr(spec, "name", "") == "lightning_em.__main__":
            # This process is the command already: the launcher runs the same script or module.
            sys.argv = [argv[0], *self.command[1:]]
        else:
            # The launcher runs `python -m <name of the spec>` with `sys.argv[1:]`.
            sys.argv, main.__spec__ = self.command, find_spec("lightning_em.__main__")
        try:
            yield
        except MisconfigurationException as error:
            raise ConfigError(explain_misconfiguration(str(error), self.args)) from error
        finally:
            if distributed.is_initialized() and not is_grouped:
                # Lightning 2.6 leaves the process group to the end of the process; the ranks of another fit in this
                # process would wait for ever for a group that its first rank believes it has.
                distributed.destroy_process_group()
            sys.argv, main.__spec__ = argv, spec
            os.environ.clear()
            os.environ.update(environment)
            # Lightning and our callbacks install handlers. Python can set handlers in the main thread only.
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)


def as_options(overrides: Mapping[str, Any]) -> list[str]:
    """Convert overrides by dotted key to command-line options.

    Raises:
        ValueError: If a value cannot be written as JSON.
    """
    options = []
    for key, value in overrides.items():
        try:
            text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        except TypeError:
            raise ValueError(
                f"{key} must be a string, a number, a truth value, or lists and mappings of them, got {value!r}."
            ) from None
        options.append(f"--{key}={text}")
    return options


def slurm_environment() -> list[SLURMEnvironment]:
    """Lightning's Slurm environment without automatic requeuing: our handlers save a checkpoint and requeue."""
    by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if by_srun else []


def _refuse_missing_start(init_from: str | None) -> None:
    """Check that the run in `model.init_from` exists, before data and base model are loaded."""
    try:
        if init_from is not None:
            runs.locate(init_from)
    except ValueError as error:
        raise ValueError(
            f"model.init_from is {init_from}, but {error} Fit that run first, or name another: lightning-em runs ls."
        ) from None
