"""Being told to stop: every rank saves at the next optimiser step, and the process says which signal it was."""

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
from lightning_em.callbacks.checkpointing import AdapterCheckpoint

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The run was told to stop and has saved.

    Attributes:
        signal: Which signal it was.
        step: The optimiser step that is on disk.
    """

    def __init__(self, received: signal.Signals, step: int, exit_code: int) -> None:
        super().__init__(exit_code)
        self.signal, self.step = received, step

    def __str__(self) -> str:
        return f"{self.signal.name} after step {self.step}"


class Signals(Callback):
    """Save and stop at the next optimiser step after SIGTERM or SIGINT to any rank; a second SIGINT ends at once.

    In a Slurm job SIGUSR1 does the same and puts the job back into the queue, once.

    The handler sets a flag and nothing more: a collective inside it would wait for ranks that were sent no
    signal. The ranks agree at the boundary of each step and before each probe; a resumed run makes up for probes
    that are missing. One probe, or the validation behind an epoch, is not cut short: its numbers belong to the
    checkpoint. Where one takes longer than 90 seconds, ask Slurm for an earlier signal: --signal=SIGUSR1@600.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it has registered by now."""
        self._asked_at = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP_SIGNALS, *([slurm.REQUEUE_SIGNAL] if slurm.job_id() else [])):
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two optimiser steps; after the epoch's last one its validation comes first."""
        if not trainer.is_last_batch and trainer.global_step != self._asked_at:
            self.stop_if_asked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        self.stop_if_asked(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the job back into the queue, once run.json says how it ended: Slurm ends the job at once.

        No rank goes on before that, for srun kills the others behind the first that fails.
        """
        if not isinstance(exception, Interrupted):
            return
        if exception.signal == slurm.REQUEUE_SIGNAL and trainer.is_global_zero:
            slurm.requeue_job()
        trainer.strategy.barrier("interrupted")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one is the system's, however busy we are

    def stop_if_asked(self, trainer: Trainer, module: LightningModule, is_saved: bool = False) -> None:
        """Ask all ranks together whether one of them has been told to stop.

        Args:
            trainer: The running trainer.
            module: Its module.
            is_saved: Whether this step is on disk; the same on every rank.

        Raises:
            Interrupted: On every rank, if so; the step is on disk then.
        """
        self._asked_at = trainer.global_step
        heard = self._heard(trainer)
        if not trainer.strategy.reduce_boolean_decision(heard is not None, all=False):
            return
        requeue = trainer.strategy.reduce_boolean_decision(heard == slurm.REQUEUE_SIGNAL, all=False)
        received = slurm.REQUEUE_SIGNAL if requeue else heard or signal.SIGTERM  # another rank got it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterCheckpoint) and not is_saved:
                callback.publish(trainer, module, tell=False)
        logger.warning(
            "%s: step %d is saved; the same command continues from there.", received.name, trainer.global_step
        )
        raise Interrupted(received, trainer.global_step, _exit_code(trainer, received))

    def _heard(self, trainer: Trainer) -> signal.Signals | None:
        """What came to this rank, also before and after training, when others listen."""
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
        # Rank zero tells the outside for all: it watches its children, or srun would kill it behind the first
        # that fails, and takes the highest code of all.
        return 0
    return 128 + received


def stop_between(trainer: Trainer, module: LightningModule) -> None:
    """Stop at a step that is on disk already, such as between two probes, if any rank has been told to."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Signals):
            callback.stop_if_asked(trainer, module, is_saved=True)


def follow_parent() -> None:
    """End this process once the one that started it is gone: a rank must not outlive its job."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
