"""Number of CPU threads of PyTorch while a trainer runs."""

from typing import Any

import torch
from lightning.pytorch import Callback


class Threads(Callback):
    """Set the number of threads that PyTorch computes with on the CPU, from the loading of the base model on.

    The number that this process had before is restored at the end. Sums are split over threads, so results on the CPU
    are the same bits only with the same number of threads.

    Args:
        num: Number of threads.

    Raises:
        ValueError: If the number is not positive.
    """

    def __init__(self, num: int) -> None:
        if num < 1:
            raise ValueError(f"num must be 1 or more, got {num}; set init_args.num of Threads.")
        self.num = num
        self._before: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Set the number; Lightning 2.6 calls this before `configure_model`."""
        if self._before is None:
            self._before = torch.get_num_threads()
        torch.set_num_threads(self.num)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the number."""
        if self._before is not None:
            torch.set_num_threads(self._before)
        self._before = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the number: Lightning 2.6 calls no `teardown` of callbacks after an exception."""
        self.teardown(trainer, pl_module, "")
