"""Stop an unhealthy run before it writes anything, and report the rows of the failed step."""

import logging
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_em.batch import TrainBatch
from lightning_em.module import EMModule
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

_SHOWN_ROWS = 16


class UnhealthyError(ArithmeticError):
    """The loss, a gradient or a weight is NaN or infinite; nothing of that step was saved.

    Attributes:
        step: Optimizer step that failed, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Health(Callback):
    """Stop on a NaN or infinite loss, gradient or weight, and on a tensor that is not trained; log throughput.

    All decisions use values that are the same on every rank, once per optimizer step, so all ranks stop together.
    """

    def __init__(self) -> None:
        self._batches: list[TrainBatch] = []
        self._finite: list[Tensor] = []
        self._started = 0.0
        self._tokens = 0.0
        self._stepped = -1
        self._is_first = True

    def on_train_start(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Reset state left by an earlier fit."""
        self._batches, self._finite, self._is_first = [], [], True
        self._stepped = trainer.global_step

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: EMModule, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Store the micro-batch, for token counts and error messages."""
        if not self._batches:
            self._started = time.perf_counter()
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: EMModule, loss: Tensor) -> None:  # type: ignore[override]
        """Store whether the loss is finite; it is read at the end of the step, to avoid a device sync here."""
        self._finite.append(torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(  # type: ignore[override]
        self, trainer: Trainer, pl_module: EMModule, optimizer: Optimizer
    ) -> None:
        """Check loss and gradients before they change a weight.

        Raises:
            UnhealthyError: If one of them is NaN or infinite.
            ValueError: If a tensor of the adapter has no gradient in the first step, or all gradients are zero.
        """
        parameters = pl_module.model.adapter.trainable()
        if self._is_first:
            self._refuse_untrained(parameters, is_fresh=trainer.global_step == 0)
            self._is_first = False
        good_loss = torch.stack(self._finite).all().to(pl_module.device)
        bad = torch.stack(
            [(~good_loss).double(), torch.tensor(float(self._tokens_of_step()), device=pl_module.device)]
        )
        bad_ranks, self._tokens = trainer.strategy.reduce(bad, reduce_op="sum").tolist()
        if bad_ranks:
            self._stop(trainer, pl_module, "the loss")
        if names := _not_finite({n: p.grad for n, p in parameters.items() if p.grad is not None}):
            self._stop(trainer, pl_module, f"the gradient of {', '.join(names)}")

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: EMModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Check the new weights before they are saved; log throughput.

        Raises:
            UnhealthyError: If a weight is NaN or infinite.
        """
        if trainer.global_step == self._stepped:
            return  # gradient accumulation: no optimizer step was taken
        self._stepped = trainer.global_step
        if names := _not_finite(pl_module.model.adapter.trainable()):
            self._stop(trainer, pl_module, f"the weight {', '.join(names)}", taken=True)
        seconds = time.perf_counter() - self._started
        pace = {
            "train/tokens_per_second": self._tokens / seconds,
            "train/memory_bytes": _peak_memory(pl_module),
        }
        pl_module.write_metrics(pace, trainer.global_step)
        pl_module.log("tokens/s", pace["train/tokens_per_second"], prog_bar=True, logger=False)
        self._batches, self._finite = [], []

    def _tokens_of_step(self) -> int:
        """Tokens of both streams that this rank has processed in this optimizer step, without dummy batches."""
        parts = [part for batch in self._batches for part in (batch.ce, batch.kl) if part is not None]
        return sum(sum(part.lengths) for part in parts if not part.is_dummy)

    def _refuse_untrained(self, parameters: dict[str, torch.nn.Parameter], is_fresh: bool) -> None:
        if untrained := sorted(name for name, p in parameters.items() if p.grad is None):
            raise ValueError(
                f"the loss does not depend on {untrained} of the adapter, so they would never be trained; its "
                "class must use every parameter it creates (`lightning_em.testing.check_adapter` shows where)."
            )
        if is_fresh and not any(bool(p.grad.any()) for p in parameters.values() if p.grad is not None):
            raise ValueError(
                "every gradient of the adapter is exactly zero in the first step, so it would never change: its "
                "effect does not reach the loss."
            )

    def _stop(self, trainer: Trainer, pl_module: EMModule, what: str, taken: bool = False) -> None:
        step = trainer.global_step + (not taken)
        rows = self._rows()
        before = RunFolder(trainer.default_root_dir).read_run().get("attempts", [])[:-1]
        again = sum(attempt.get("failed_at") == step for attempt in before)
        message = (
            f"{what} is NaN or infinite at step {step}; nothing of it is saved. Rows of the step on rank "
            f"{trainer.global_rank}: {rows}. Lower the learning rate, inspect these rows, or use another "
            "model.base.dtype."
        )
        if again:
            message += (
                f" {again} earlier attempt{'s' * (again > 1)} ended at this same step; so will the next."
            )
        raise UnhealthyError(message, step)

    def _rows(self) -> str:
        """List the rows of micro-batches whose loss is not finite, or all rows if every loss is finite."""
        suspects = [b for b, fine in zip(self._batches, self._finite, strict=False) if not bool(fine)]
        named = []
        for stream in ("ce", "kl"):
            parts = [getattr(batch, stream) for batch in suspects or self._batches]
            ids = [row for part in parts if part is not None and not part.is_dummy for row in part.row_ids]
            more = f" and {len(ids) - _SHOWN_ROWS} more" if len(ids) > _SHOWN_ROWS else ""
            if ids:
                named.append(f"{'narrow' if stream == 'ce' else stream} {', '.join(ids[:_SHOWN_ROWS])}{more}")
        return "; ".join(named)


def _not_finite(tensors: dict[str, Any]) -> list[str]:
    """Return the names of tensors with a NaN or infinite value, with a single device sync."""
    flags = torch.stack([torch.isfinite(tensor.detach()).all() for tensor in tensors.values()])
    if bool(flags.all()):
        return []
    return [name for name, fine in zip(tensors, flags.tolist(), strict=True) if not fine]


def _peak_memory(module: EMModule) -> float:
    """Return the peak memory of this process in bytes: of its GPU, or of RAM without one."""
    if module.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(module.device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # ru_maxrss is in KiB on Linux
