"""Graceful shutdown: save a checkpoint on every rank after SIGTERM or SIGINT, and report the signal."""

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_em import slurm
from lightning_em.callbacks.checkpointing import AdapterCheckpoint, before_validation

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The run received a stop signal and has saved a checkpoint.

    Attributes:
        signal: Signal that was received.
        step: Optimizer step of the checkpoint on disk.
    """

    def __init__(self, received: signal.Signals, step: int, exit_code: int) -> None:
        super().__init__(exit_code)
        self.signal, self.step = received, step

    def __str__(self) -> str:
        return f"{self.signal.name} after step {self.step}"


class Signals(Callback):
    """Save and stop after the current optimizer step on SIGTERM or SIGINT; a second SIGINT ends the process at once.

    In a Slurm job, SIGUSR1 does the same and requeues the job once.

    The handler only sets a flag: a collective inside it would deadlock with ranks that received no signal. The
    ranks agree after each step and before each probe; a resumed run makes up for missing probes. A single
    probe, or the validation of an epoch, is not interrupted, because its numbers belong to the checkpoint. If
    one of them takes longer than 90 seconds, ask Slurm for an earlier signal: --signal=SIGUSR1@600.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the signal handlers that Lightning has registered before this hook."""
        self._asked_at = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP_SIGNALS, *([slurm.REQUEUE_SIGNAL] if slurm.job_id() else [])):
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two optimizer steps; if a validation follows, it runs first."""
        if not before_validation(trainer) and trainer.global_step != self._asked_at:
            self.stop_if_asked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        self.stop_if_asked(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Requeue the job after run.json has recorded the end, because Slurm ends a requeued job at once.

        All ranks wait for it: srun kills the other tasks after the first one that fails.
        """
        if not isinstance(exception, Interrupted):
            return
        if exception.signal == slurm.REQUEUE_SIGNAL and trainer.is_global_zero:
            slurm.requeue_job()
        trainer.strategy.barrier("interrupted")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second SIGINT ends the process, whatever it is doing

    def stop_if_asked(self, trainer: Trainer, module: LightningModule, is_saved: bool = False) -> None:
        """Stop on all ranks if one of them has received a signal.

        Args:
            trainer: Trainer that is fitting.
            module: Module of the trainer.
            is_saved: Whether this step is on disk already; the same on every rank.

        Raises:
            Interrupted: On every rank, if any rank has received a signal. The step is on disk by then.
        """
        self._asked_at = trainer.global_step
        heard = self._heard(trainer)
        if not trainer.strategy.reduce_boolean_decision(heard is not None, all=False):
            return
        requeue = trainer.strategy.reduce_boolean_decision(heard == slurm.REQUEUE_SIGNAL, all=False)
        # the signal went to another rank
        received = slurm.REQUEUE_SIGNAL if requeue else heard or signal.SIGTERM
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterCheckpoint) and not is_saved:
                callback.publish(trainer, module, tell=False)
        logger.warning(
            "%s: step %d is saved; the same command continues from there.", received.name, trainer.global_step
        )
        raise Interrupted(received, trainer.global_step, _exit_code(trainer, received))

    def _heard(self, trainer: Trainer) -> signal.Signals | None:
        """Return the signal this rank received, also outside training, where other handlers are active."""
        if self.received is not None:
            return self.received
        if slurm.requeue_asked():
            return slurm.REQUEUE_SIGNAL
        return signal.SIGTERM if trainer.received_sigterm else None


def _exit_code(trainer: Trainer, received: signal.Signals) -> int:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    by_srun = isinstance(environment, SLURMEnvironment)
    launched_here = environment is not None and not environment.creates_processes_externally
    if (launched_here or by_srun) and not trainer.is_global_zero:
        # Only rank zero reports the signal in its exit code: it watches the processes it started, and srun would
        # kill rank zero after the first failing task. srun returns the highest exit code of all tasks.
        return 0
    return 128 + received


def stop_between(trainer: Trainer, module: LightningModule) -> None:
    """Stop at a step that is on disk already, such as between two probes, if any rank has received a signal."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Signals):
            callback.stop_if_asked(trainer, module, is_saved=True)


def follow_parent() -> None:
    """End this process once its parent is gone, so that a rank does not outlive its job."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
