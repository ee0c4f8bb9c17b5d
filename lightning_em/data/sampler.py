"""The micro-batches of one rank, starting at the resumed position."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from lightning_em.batch import StepCounts
from lightning_em.data.steps import BatchGeometry, StepRows, make_steps


class MicroBatchIndices(NamedTuple):
    """Row indices of one micro-batch; a rank without rows of its own gets a dummy batch.

    `step_counts` holds the token counts of the whole optimizer step, over all micro-batches and all ranks.
    """

    ce_rows: tuple[int, ...]
    kl_rows: tuple[int, ...]
    ce_is_dummy: bool
    kl_is_dummy: bool
    step_counts: StepCounts


class RowCounts(NamedTuple):
    """Token counts of each row of a stream: counted response tokens and all tokens; empty without the stream."""

    response: Sequence[int]
    all: Sequence[int]


class StepSampler(Sampler[MicroBatchIndices]):
    """Cuts each epoch into optimizer steps and yields this rank's micro-batches.

    The epoch is a permutation of the narrow rows, drawn from (seed, epoch). The KL stream is an endless chain
    of permutations, drawn from (seed, cycle), so that the narrow order is the same with and without KL data.
    `lightning_em.data.steps` describes how both are cut.

    Args:
        narrow: Token counts of the narrow rows.
        kl: Token counts of the KL rows.
        geometry: Batch sizes, accumulation and ranks.
        rank: Rank of this process.
        seed: Seed of the order of both streams.

    Raises:
        ValueError: If there are no narrow rows, the rank is out of range, or the token budget is too small.
    """

    def __init__(
        self, narrow: RowCounts, kl: RowCounts, geometry: BatchGeometry, rank: int = 0, seed: int = 0
    ) -> None:
        if not narrow.response:
            raise ValueError("there are no narrow rows to train on.")
        if not 0 <= rank < geometry.world_size:
            raise ValueError(f"rank must lie in 0..{geometry.world_size - 1}, got {rank}.")
        assert len(narrow.response) == len(narrow.all)
        assert len(kl.response) == len(kl.all)
        self.narrow_counts = torch.tensor(narrow.response)
        self.kl_response_counts = torch.tensor(kl.response)
        self.kl_all_counts = torch.tensor(kl.all)
        self.steps = make_steps(narrow.all, kl.all, geometry, seed)
        self.world_size, self.rank = geometry.world_size, rank
        self.epoch = 0
        self._resumed_epoch: int | None = None
        self._consumed = 0
        self._cut_epochs = 0

    def __len__(self) -> int:
        """Number of micro-batches of a whole epoch on one rank, also after `start_at`; Lightning relies on it."""
        return sum(map(self.steps.micro_batches, range(self.num_steps)))

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        """Yield the micro-batches of the current epoch, without those already consumed."""
        skip = self._consumed if self.epoch == self._resumed_epoch else 0
        for number in range(self.num_steps):
            num_micro_batches = self.steps.micro_batches(number)
            if skip >= num_micro_batches:
                skip -= num_micro_batches
                continue
            yield from self._micro_batches(self.steps.step(self.epoch, number), num_micro_batches, skip)
            skip = 0

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.steps.num_steps

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, in Lightning's count."""
        self.epoch = epoch - self._cut_epochs

    def start_at(self, epoch: int, consumed: int, cut_epochs: int = 0) -> None:
        """Resume: skip the first `consumed` micro-batches of `epoch`; other epochs stay complete.

        Args:
            epoch: Epoch to continue with.
            consumed: Number of its micro-batches that this rank has processed.
            cut_epochs: Number of epochs by which Lightning's count is ahead, see `Position`.

        Raises:
            ValueError: If the epoch has fewer micro-batches than that.
        """
        if not 0 <= consumed <= len(self):
            raise ValueError(f"cannot skip {consumed} micro-batches of an epoch that has {len(self)}.")
        self.epoch = self._resumed_epoch = epoch
        self._consumed = consumed
        self._cut_epochs = cut_epochs

    def _micro_batches(
        self, step: StepRows, num_micro_batches: int, skip: int
    ) -> Iterator[MicroBatchIndices]:
        ce_rows, kl_rows = ([row for chunk in chunks for row in chunk] for chunks in step)
        counts = StepCounts(
            ce=int(self.narrow_counts[ce_rows].sum()),
            kl_response=int(self.kl_response_counts[kl_rows].sum()) if kl_rows else 0,
            kl_all=int(self.kl_all_counts[kl_rows].sum()) if kl_rows else 0,
        )
        for micro_batch in range(skip, num_micro_batches):
            chunk = micro_batch * self.world_size + self.rank
            ce, ce_is_dummy = _or_dummy(step.ce[chunk], ce_rows)
            kl, kl_is_dummy = _or_dummy(step.kl[chunk] if kl_rows else [], kl_rows)
            yield MicroBatchIndices(ce, kl, ce_is_dummy, kl_is_dummy, counts)


def _or_dummy(rows: list[int], of_step: list[int]) -> tuple[tuple[int, ...], bool]:
    """Return the rows of a micro-batch or, if it has none, one row of the optimizer step as a dummy batch."""
    if rows or not of_step:
        return tuple(rows), False
    return (of_step[0],), True
