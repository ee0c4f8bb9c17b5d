"""Being told to stop: every rank saves at the next optimiser step, and the process says which signal it was."""

import logging
import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_em.callbacks.checkpointing import AdapterCheckpoint

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEUE_SIGNAL = signal.SIGUSR1  # what `#SBATCH --signal=SIGUSR1@90` sends before the time limit


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
    signal. The ranks agree at the boundary of each step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it has registered by now."""
        self.received = signal.SIGTERM if trainer.received_sigterm else None
        if _requeue_asked:
            self.received = REQUEUE_SIGNAL
        self._asked_at = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP_SIGNALS, *([REQUEUE_SIGNAL] if slurm_job() else [])):
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two optimiser steps; after the epoch's last one its validation comes first."""
        if not trainer.is_last_batch and trainer.global_step != self._asked_at:
            self._stop_if_asked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        self._stop_if_asked(trainer, pl_module)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one is the system's, however busy we are

    def _stop_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._asked_at = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        requeue = trainer.strategy.reduce_boolean_decision(self.received == REQUEUE_SIGNAL, all=False)
        received = REQUEUE_SIGNAL if requeue else self.received or signal.SIGTERM  # another rank got it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterCheckpoint):
                callback.publish(trainer, pl_module, tell=False)
        logger.warning(
            "%s: step %d is saved; the same command continues from there.", received.name, trainer.global_step
        )
        if requeue and trainer.is_global_zero:
            requeue_job()
        raise Interrupted(received, trainer.global_step, self._exit_code(trainer, received))

    def _exit_code(self, trainer: Trainer, received: signal.Signals) -> int:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        launched_here = environment is not None and not environment.creates_processes_externally
        if launched_here and not trainer.is_global_zero:
            return 0  # rank zero watches its children and would be killed before it can tell the outside
        return 128 + received


_requeue_asked: list[int] = []


def note_requeue_signal() -> None:
    """In a Slurm job, take note of SIGUSR1 from now on, so that before and after training it kills nothing.

    Lightning puts this handler back when training is over; a request from before it is honoured at step 1.
    """
    if slurm_job() and threading.current_thread() is threading.main_thread():
        signal.signal(REQUEUE_SIGNAL, lambda number, _: _requeue_asked.append(number))


def slurm_job() -> str | None:
    """Id of the Slurm job this process is part of, as `scontrol` takes it; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue_job() -> None:
    """Put this Slurm job back into the queue; where that fails, say how to do it by hand."""
    words = ["scontrol", "requeue", str(slurm_job())]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603 (Slurm's own id)
        logger.warning("requeued: %s", " ".join(words))
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("could not requeue (%s); submit the job again, it continues from here.", error)


def follow_parent() -> None:
    """End this process once the one that started it is gone: a rank must not outlive its job."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="follow-parent", daemon=True).start()
