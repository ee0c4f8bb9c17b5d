"""Callbacks that end the process of a fit; named in a study with `allow_import: tests`."""

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Leave(Callback):
    """End the process as a library does that takes itself for the whole program."""

    def __init__(self, code: Any = "nothing to do for me") -> None:
        self.code = code

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        raise SystemExit(self.code)


class Die(Callback):
    """Kill the process right before the step with this number."""

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class LoseTheGpu(Callback):
    """Fail as after an illegal access: whatever this process asks of its GPU from then on fails too."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        def synchronize() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = synchronize
        synchronize()
