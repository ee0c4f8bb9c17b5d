"""Position of a run in its data, read from the trainer's own counters."""

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_em.data.steps import BatchGeometry


class Position(NamedTuple):
    """The next micro-batch of a run.

    Attributes:
        epoch: Index of the pass over the narrow rows.
        consumed: Number of its micro-batches that this rank has processed.
        cut_epochs: Number of times Lightning stopped within an epoch and counted it as complete. A resumed trainer
            finishes the same pass and counts the rest as the next epoch.
    """

    epoch: int
    consumed: int
    cut_epochs: int


def current_position(trainer: Trainer, cut_epochs: int) -> Position:
    """Return the position to save; valid in every hook that writes a checkpoint.

    Args:
        trainer: The trainer that is fitting.
        cut_epochs: `cut_epochs` of the position this run was resumed from; 0 for a fresh run.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    # Lightning raises `processed` after the training step and before on_train_batch_end.
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    consumed: int = batches.processed
    is_whole = consumed >= trainer.num_training_batches
    epoch: int = epochs.processed - cut_epochs
    if epochs.started > epochs.processed:
        return Position(epoch + 1, 0, cut_epochs) if is_whole else Position(epoch, consumed, cut_epochs)
    if consumed == 0 or is_whole:
        # between epochs the batch counter still belongs to the old epoch
        return Position(epoch, 0, cut_epochs)
    return Position(epoch - 1, consumed, cut_epochs + 1)


def forget_finished_epoch(trainer: Trainer) -> None:
    """Make Lightning start the next epoch of a resumed run at its first batch; call in `on_train_start`.

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
    """Conversion of micro-batch counters for a run that continues on another number of ranks.

    4 ranks with 2 accumulated micro-batches and 1 rank with 8 take the same rows in an optimizer step, so each
    can continue a run of the other.

    Attributes:
        before: Micro-batches of one rank in an optimizer step, in the checkpoint.
        now: Micro-batches of one rank in an optimizer step, from here on.
        micro_batches: Micro-batches of one rank in an epoch, from here on.
    """

    before: int
    now: int
    micro_batches: int

    def __call__(self, count: int) -> int:
        """Convert a count of micro-batches within an epoch, through the optimizer steps it corresponds to."""
        steps = -(-count // self.before)
        return min(steps * self.now, self.micro_batches)  # the last optimizer step of an epoch may be short

    def progress(self, batches: dict[str, Any]) -> None:
        """Rewrite Lightning's own counters in a checkpoint's state before Lightning reads them."""
        processed = batches["current"]["processed"]
        # `completed` is one less than `processed` in a checkpoint written at the end of a batch; Lightning
        # corrects that on resume, so the difference is kept.
        batches["current"] = {
            name: self(processed) - (processed - count) for name, count in batches["current"].items()
        }


def same_steps(order: dict[str, Any], now: BatchGeometry) -> bool:
    """Tell whether a checkpoint's order has the same optimizer steps and only differs in how ranks share them."""
    before = int(order.get("accumulate", 0))
    return before != now.accumulate and before * int(order.get("world_size", 0)) == now.micro_batches_per_step


def refuse_cut_steps(trainer: Trainer, accumulate: int, num_micro_batches: int) -> None:
    """Reject trainer settings that would cut an optimizer step short or reorder the data.

    Args:
        trainer: Trainer that is about to fit.
        accumulate: Micro-batches of one rank in an optimizer step.
        num_micro_batches: Micro-batches of one rank in an epoch.

    Raises:
        ValueError: If a setting would cut a step or reorder the data.
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
            f"not a multiple of trainer.accumulate_grad_batches {accumulate}; set data.narrow.limit instead."
        )
