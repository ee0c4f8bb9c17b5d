"""Loaders over rows in memory: iterables with a length, which Lightning uses without rebuilding them."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_em.batch import EncodedRow, PackedBatch, TrainBatch
from lightning_em.data.sampler import MicroBatchIndices

BatchT = TypeVar("BatchT", PackedBatch, TrainBatch)


class TrainRows(Dataset[TrainBatch]):
    """Rows of both streams, indexed by micro-batch."""

    def __init__(self, narrow: Sequence[EncodedRow], kl: Sequence[EncodedRow]) -> None:
        self.narrow = narrow
        self.kl = kl

    def __getitem__(self, indices: MicroBatchIndices) -> TrainBatch:
        ce = PackedBatch.from_rows([self.narrow[index] for index in indices.ce_rows])
        kl = PackedBatch.from_rows([self.kl[index] for index in indices.kl_rows]) if indices.kl_rows else None
        if indices.ce_is_dummy:
            ce = ce.dummy()
        if kl is not None and indices.kl_is_dummy:
            kl = kl.dummy()
        return TrainBatch(ce, kl, indices.step_counts)


class EvaluationRows(Dataset[PackedBatch]):
    """This rank's share of some rows, cut into batches.

    Each row is on exactly one rank, and every rank has the same number of batches. A rank that has no rows left
    for a batch gets a dummy batch, so that collectives stay in step.
    """

    def __init__(self, rows: Sequence[EncodedRow], batch_size: int, rank: int, world_size: int) -> None:
        self.rows = rows[rank::world_size]
        self.stand_in = rows[0]
        self.batch_size = batch_size
        self.num_batches = -(-len(rows[::world_size]) // batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> PackedBatch:
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        return PackedBatch.from_rows(rows) if rows else PackedBatch.from_rows([self.stand_in]).dummy()


class BatchLoader(Generic[BatchT]):
    """Iterates over ready-made batches of a dataset, optionally in worker processes.

    This class is deliberately not a `DataLoader`: Lightning would rebuild that with its own sampler. It draws
    nothing from the global random generator. Workers start at the first batch, not when Lightning asks for the
    iterator, because at that time the resumed position is not known yet.
    """

    batch_sampler = None  # Lightning reads this attribute of validation loaders

    def __init__(self, dataset: Dataset[BatchT], sampler: Sampler[Any], num_workers: int = 0) -> None:
        self._dataset: Dataset[BatchT] = dataset
        self.sampler = sampler
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BatchT]:
        yield from DataLoader(
            self._dataset,
            sampler=self.sampler,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator().manual_seed(0),  # seeds the workers, which draw nothing
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: `EMDataModule` saves the position. Lightning requires this pair for a resumable loader."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""


def _unchanged(batch: BatchT) -> BatchT:
    return batch
