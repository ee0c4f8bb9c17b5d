"""Callbacks that inject faults into a fit; enabled on its command line with `--allow_import tests`."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Slow(Callback):
    """Sleep before each micro-batch, so that a step takes long enough to be interrupted."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(self.seconds)


class RecordRows(Callback):
    """Append step and row ids of every micro-batch to a file."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        kl = list(batch.kl.row_ids) if batch.kl is not None else []
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([trainer.global_step, list(batch.ce.row_ids), kl]) + "\n")


class Poison(Callback):
    """Set one weight to NaN right before a given step, so that the loss of that step is NaN."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step - 1:
            with torch.no_grad():
                next(iter(pl_module.model.adapter.trainable().values())).view(-1)[0] = float("nan")


class Terminate(Callback):
    """Send SIGTERM to this process at the beginning of a given step's micro-batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


class TellPid(Callback):
    """Write each rank's process id to a file next to the run."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.folder / f"pid-{trainer.global_rank}").write_text(str(os.getpid()), encoding="utf-8")
