"""Where a run stands in its data, read from the trainer's own counters."""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_em.data.windows import BatchGeometry


class Position(NamedTuple):
    """The next micro-batch of a run.

    Attributes:
        epoch: Pass over the narrow rows.
        consumed: Micro-batches of it that this rank has been through.
        cut_epochs: How often Lightning stopped within an epoch and counted it as done: a resumed trainer
            goes on with the rest of the same pass, and calls it the next epoch.
    """

    epoch: int
    consumed: int
    cut_epochs: int


def current_position(trainer: Trainer, cut_epochs: int) -> Position:
    """The position to save, in whichever hook the checkpoint is written.

    Args:
        trainer: The trainer that is fitting.
        cut_epochs: Of the position this run was resumed from; 0 for a fresh one.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    # `processed` counts a batch before on_train_batch_end, and not before its training step is over.
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    consumed: int = batches.processed
    is_whole = consumed >= trainer.num_training_batches
    epoch: int = epochs.processed - cut_epochs
    if epochs.started > epochs.processed:
        return Position(epoch + 1, 0, cut_epochs) if is_whole else Position(epoch, consumed, cut_epochs)
    if consumed == 0 or is_whole:
        return Position(epoch, 0, cut_epochs)  # between epochs the batch counter is still that of the old one
    return Position(epoch - 1, consumed, cut_epochs + 1)


def forget_finished_epoch(trainer: Trainer) -> None:
    """Call in `on_train_start`: make Lightning begin an epoch of a resumed run at its first batch.

    Under `max_steps`, a checkpoint written between two epochs (`on_train_epoch_end`, `on_train_end`) leaves
    the batch counter at the end of the old epoch, and the resumed trainer (lightning 2.6.6) would take one
    batch of the next epoch and count it as done.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    if epochs.started == epochs.processed and batches.completed >= trainer.num_training_batches:
        loop.batch_progress.reset_on_run()
        loop.scheduler_progress.reset_on_run()
        loop.automatic_optimization.optim_progress.reset_on_run()


class Regearing(NamedTuple):
    """How counts of micro-batches change where a run goes on with another number of ranks.

    4 ranks that accumulate twice and 1 that accumulates 8 times take the same rows in a step, so one may
    continue what the other began.

    Attributes:
        before: Micro-batches of a rank in a step, so far.
        now: The same from here on.
        micro_batches: Of an epoch of one rank, from here on.
    """

    before: int
    now: int
    micro_batches: int

    def __call__(self, count: int) -> int:
        """Micro-batches of an epoch after as many optimiser steps as `count` stands for."""
        steps = -(-count // self.before)
        return min(steps * self.now, self.micro_batches)  # an epoch ends in a short window

    def progress(self, batches: dict[str, Any]) -> None:
        """Rewrite Lightning's own counters, in a checkpoint's state, before it reads them."""
        processed = batches["current"]["processed"]
        # `completed` is one behind in a checkpoint written at the end of a batch, and is made up for on resume
        batches["current"] = {
            name: self(processed) - (processed - count) for name, count in batches["current"].items()
        }


def same_steps(order: dict[str, Any], now: BatchGeometry) -> bool:
    """Whether a checkpoint's order of rows is cut into the same steps, only dealt out to other ranks."""
    before = int(order.get("accumulate", 0))
    return before != now.accumulate and before * int(order.get("world_size", 0)) == now.chunks_per_window


def refuse_cut_windows(trainer: Trainer, accumulate: int, num_micro_batches: int) -> None:
    """Refuse trainer settings under which an optimiser step would see only part of its window.

    Args:
        trainer: That will fit.
        accumulate: Micro-batches in a step.
        num_micro_batches: Of an epoch of one rank.

    Raises:
        ValueError: If it would cut a step, or reorder the data.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    if getattr(trainer, "overfit_batches", 0):
        raise ValueError("trainer.overfit_batches would reorder the data: set data.narrow.limit instead.")
    limit = trainer.limit_train_batches
    used = int(num_micro_batches * limit) if isinstance(limit, float) else min(limit, num_micro_batches)
    if used < num_micro_batches and used % accumulate:
        raise ValueError(
            f"trainer.limit_train_batches leaves {used} of {num_micro_batches} micro-batches, which is "
            f"no multiple of trainer.accumulate_grad_batches {accumulate}; set data.narrow.limit instead."
        )
