"""Where a run stands in its data, read from the trainer's own counters."""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer


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
