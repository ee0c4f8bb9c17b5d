"""Which rows each optimiser step trains on: a function of seed and epoch, whatever the number of ranks."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from lightning_em.batch import WindowCounts


class WindowIndices(NamedTuple):
    """Row numbers of one micro-batch; a ghost stands in where a rank has no row of its own.

    `window` holds the counts of the whole optimiser step, over all its micro-batches and all ranks.
    """

    ce_rows: tuple[int, ...]
    kl_rows: tuple[int, ...]
    ce_ghost: bool
    kl_ghost: bool
    window: WindowCounts


@dataclass(frozen=True)
class BatchGeometry:
    """How the rows of an optimiser step are laid out.

    Attributes:
        batch_size: Narrow rows in a micro-batch of one rank.
        kl_batch_size: KL rows in a micro-batch of one rank.
        accumulate: Micro-batches in an optimiser step.
        world_size: Ranks.
    """

    batch_size: int
    kl_batch_size: int
    accumulate: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def chunks_per_window(self) -> int:
        """Micro-batches of one optimiser step, over all ranks."""
        return self.accumulate * self.world_size


class WindowSampler(Sampler[WindowIndices]):
    """Cut each epoch into windows, one per optimiser step, and give this rank its micro-batches.

    The epoch is a permutation of the narrow rows, drawn from (seed, epoch), in windows of `batch_size x
    accumulate x world_size` rows. The KL stream is an endless chain of permutations, drawn from (seed,
    cycle); each window takes the next `kl_batch_size x accumulate x world_size` of it. So a window's content
    depends on the global batch alone, and the narrow order is the same with and without a KL stream. The
    short last window of n rows has ceil(n / (batch_size x world_size)) micro-batches and KL rows in
    proportion, rounded up; both are dealt out as evenly as possible.

    Args:
        narrow_counts: Counted tokens of each narrow row.
        kl_response_counts: Counted response tokens of each KL row; empty without a KL stream.
        kl_all_counts: Counted tokens of each KL row where every position counts.
        geometry: Batch sizes, accumulation and ranks.
        rank: This process.
        seed: Of both streams.

    Raises:
        ValueError: If there is no narrow row, or a rank outside the world.
    """

    def __init__(
        self,
        narrow_counts: Sequence[int],
        kl_response_counts: Sequence[int],
        kl_all_counts: Sequence[int],
        geometry: BatchGeometry,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if not narrow_counts:
            raise ValueError("there are no narrow rows to train on.")
        if not 0 <= rank < geometry.world_size:
            raise ValueError(f"rank must lie in 0..{geometry.world_size - 1}, got {rank}.")
        assert len(kl_response_counts) == len(kl_all_counts)
        self.narrow_counts = torch.tensor(narrow_counts)
        self.kl_response_counts = torch.tensor(kl_response_counts)
        self.kl_all_counts = torch.tensor(kl_all_counts)
        self.geometry = geometry
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._resumed_epoch: int | None = None
        self._consumed = 0
        self._cut_epochs = 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on one rank, also after `start_at`: Lightning counts from it."""
        full, rest = divmod(len(self.narrow_counts), self._window_rows)
        return full * self.geometry.accumulate + self._micro_batches(rest)

    def __iter__(self) -> Iterator[WindowIndices]:
        """The micro-batches of the epoch that is set, without those already consumed."""
        skip = self._consumed if self.epoch == self._resumed_epoch else 0
        order = permutation(len(self.narrow_counts), self.seed, "narrow", self.epoch)
        for first in range(0, len(order), self._window_rows):
            rows = order[first : first + self._window_rows]
            num_micro_batches = self._micro_batches(len(rows))
            if skip >= num_micro_batches:
                skip -= num_micro_batches
                continue
            yield from self._window(rows, self._kl_rows(first, len(rows)), skip)
            skip = 0

    @property
    def num_windows(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.narrow_counts) // self._window_rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives, in Lightning's count."""
        self.epoch = epoch - self._cut_epochs

    def start_at(self, epoch: int, consumed: int, cut_epochs: int = 0) -> None:
        """Resume: leave out the first `consumed` micro-batches of `epoch`; other epochs stay whole.

        Args:
            epoch: Where to go on.
            consumed: How many of its micro-batches this rank has been through.
            cut_epochs: By how much Lightning's count of epochs is ahead, see `Position`.

        Raises:
            ValueError: If the epoch has fewer micro-batches than that.
        """
        if not 0 <= consumed <= len(self):
            raise ValueError(f"cannot skip {consumed} micro-batches of an epoch that has {len(self)}.")
        self.epoch = self._resumed_epoch = epoch
        self._consumed = consumed
        self._cut_epochs = cut_epochs

    @property
    def _window_rows(self) -> int:
        return self.geometry.batch_size * self.geometry.chunks_per_window

    def _micro_batches(self, num_rows: int) -> int:
        return -(-num_rows // (self.geometry.batch_size * self.geometry.world_size))

    def _num_kl_rows(self, num_rows: int) -> int:
        """KL rows that go with `num_rows` narrow rows: in proportion, rounded up."""
        return -(-num_rows * self.geometry.kl_batch_size // self.geometry.batch_size)

    def _kl_rows(self, first: int, num_rows: int) -> list[int]:
        """KL rows of the window that begins with narrow row `first` of the epoch."""
        stream = len(self.kl_all_counts)
        if not stream:
            return []
        per_epoch = self._num_kl_rows(len(self.narrow_counts))
        start = self.epoch * per_epoch + self._num_kl_rows(first)
        positions = range(start, start + self._num_kl_rows(num_rows))
        cycles = {
            cycle: permutation(stream, self.seed, "kl", cycle)
            for cycle in range(positions[0] // stream, positions[-1] // stream + 1)
        }
        return [cycles[position // stream][position % stream] for position in positions]

    def _window(self, rows: list[int], kl_rows: list[int], skip: int) -> Iterator[WindowIndices]:
        counts = WindowCounts(
            ce=int(self.narrow_counts[rows].sum()),
            kl_response=int(self.kl_response_counts[kl_rows].sum()) if kl_rows else 0,
            kl_all=int(self.kl_all_counts[kl_rows].sum()) if kl_rows else 0,
        )
        num_micro_batches = self._micro_batches(len(rows))
        num_chunks = num_micro_batches * self.geometry.world_size
        for micro_batch in range(skip, num_micro_batches):
            chunk = micro_batch * self.geometry.world_size + self.rank
            ce, ce_ghost = _deal(rows, chunk, num_chunks)
            kl, kl_ghost = _deal(kl_rows, chunk, num_chunks)
            yield WindowIndices(ce, kl, ce_ghost, kl_ghost, counts)


def permutation(num_rows: int, *key: object) -> list[int]:
    """A permutation of `num_rows` rows drawn from `key`, with a generator of its own."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    return order


def _deal(rows: list[int], chunk: int, num_chunks: int) -> tuple[tuple[int, ...], bool]:
    """One of `num_chunks` parts that are as equal as possible; a ghost for an empty one."""
    part = rows[chunk * len(rows) // num_chunks : (chunk + 1) * len(rows) // num_chunks]
    if part or not rows:
        return tuple(part), False
    return (rows[0],), True
