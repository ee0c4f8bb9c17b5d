"""Rows of each optimizer step, by a fixed number of rows or of tokens."""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class BatchGeometry:
    """How the rows of an optimizer step are divided.

    Attributes:
        batch_size: Narrow rows in a micro-batch of one rank.
        kl_batch_size: KL rows in a micro-batch of one rank.
        accumulate: Micro-batches of one rank in an optimizer step.
        world_size: Number of ranks.
        max_tokens: Tokens in a micro-batch, instead of a number of rows; the batch sizes then only give the ratio
            of KL rows to narrow rows.
        length_buckets: Number of consecutive micro-batches whose rows are sorted by length and cut again.
    """

    batch_size: int
    kl_batch_size: int
    accumulate: int = 1
    world_size: int = 1
    max_tokens: int | None = None
    length_buckets: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                key = "trainer.accumulate_grad_batches" if name == "accumulate" else f"data.{name}"
                raise ValueError(f"{key} must be at least 1, got {value}.")
        if self.max_tokens is not None and self.length_buckets is not None:
            raise ValueError(
                "data.length_buckets needs micro-batches of batch_size rows: leave it or data.max_tokens out."
            )

    @property
    def micro_batches_per_step(self) -> int:
        """Number of micro-batches in one optimizer step, over all ranks."""
        return self.accumulate * self.world_size


class _Cycle(NamedTuple):
    """One pass over a stream; `begins` is the number of tokens before each row."""

    rows: list[int]
    begins: list[int]


class EndlessRows:
    """The rows of a stream repeated endlessly, each pass in an order drawn from the seed.

    Args:
        lengths: Number of tokens of each row.
        name: Name of the stream.
        seed: Seed of the orders.
        bucket_rows: Rows of one micro-batch, which should be of similar length.
        buckets: Number of micro-batches sorted by length together; 1 leaves the order unchanged.
    """

    def __init__(
        self, lengths: Sequence[int], name: str, seed: int, bucket_rows: int = 1, buckets: int = 1
    ) -> None:
        self.lengths, self.name, self.seed = lengths, name, seed
        self.bucket_rows, self.buckets = bucket_rows, buckets
        self.num_tokens = sum(lengths)
        self._recent: dict[int, _Cycle] = {}

    def order(self, cycle: int) -> list[int]:
        """Row indices of one pass."""
        return self._cycle(cycle).rows

    def take(self, first: int, count: int) -> list[int]:
        """Return `count` rows from position `first` on."""
        size = len(self.lengths)
        return [self.order(place // size)[place % size] for place in range(first, first + count)]

    def beginning_in(self, first: int, last: int) -> list[int]:
        """Return the rows whose first token lies in `[first, last)`, counted in tokens."""
        rows: list[int] = []
        for cycle in range(first // self.num_tokens, -(-last // self.num_tokens)):
            order, begins = self._cycle(cycle)
            since = cycle * self.num_tokens
            rows += order[bisect_left(begins, first - since) : bisect_left(begins, last - since)]
        return rows

    def _cycle(self, cycle: int) -> "_Cycle":
        if cycle not in self._recent:
            order = permutation(len(self.lengths), self.seed, self.name, cycle)
            if self.buckets > 1:
                order = self._bucketed(order, cycle)
            for old in sorted(self._recent)[:-2]:
                del self._recent[old]
            begins = accumulate((self.lengths[row] for row in order[:-1]), initial=0)
            self._recent[cycle] = _Cycle(order, list(begins))
        return self._recent[cycle]

    def _bucketed(self, order: list[int], cycle: int) -> list[int]:
        found: list[int] = []
        pool_rows = self.bucket_rows * self.buckets
        for first in range(0, len(order), pool_rows):
            pool = sorted(order[first : first + pool_rows], key=lambda row: self.lengths[row])
            parts = [pool[at : at + self.bucket_rows] for at in range(0, len(pool), self.bucket_rows)]
            full = [part for part in parts if len(part) == self.bucket_rows]
            shuffled = permutation(len(full), self.seed, self.name, cycle, "buckets", first)
            found += [row for part in shuffled for row in full[part]]
            found += parts[-1] if len(full) < len(parts) else []  # an incomplete micro-batch stays last
        return found


class StepRows(NamedTuple):
    """Rows of one optimizer step: one list for each micro-batch of each rank."""

    ce: list[list[int]]
    kl: list[list[int]]


class StepsByRows:
    """Optimizer steps of `batch_size x accumulate x world_size` narrow rows.

    Each step takes the next `kl_batch_size x accumulate x world_size` KL rows. The last step of an epoch may be
    short: with n rows it has ceil(n / (batch_size x world_size)) micro-batches of each rank and KL rows in proportion,
    rounded up. Rows are distributed as evenly as possible. The rows of a step depend only on the global batch
    size, unless `length_buckets` is set.

    Args:
        narrow: Narrow rows; one cycle is an epoch.
        kl: KL rows; None without a KL stream.
        geometry: Batch sizes, accumulation and ranks.
    """

    def __init__(self, narrow: EndlessRows, kl: EndlessRows | None, geometry: BatchGeometry) -> None:
        self.narrow, self.kl, self.geometry = narrow, kl, geometry
        self.rows = geometry.batch_size * geometry.micro_batches_per_step

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return -(-len(self.narrow.lengths) // self.rows)

    def micro_batches(self, number: int) -> int:
        """Number of micro-batches of one rank in an optimizer step."""
        return -(-self._num_rows(number) // (self.geometry.batch_size * self.geometry.world_size))

    def step(self, epoch: int, number: int) -> StepRows:
        """Return the rows of one optimizer step of an epoch."""
        first, num_rows = number * self.rows, self._num_rows(number)
        num_chunks = self.micro_batches(number) * self.geometry.world_size
        ce = self.narrow.order(epoch)[first : first + num_rows]
        if self.kl is None:
            return StepRows(_dealt(ce, num_chunks), [])
        begin = epoch * self._num_kl_rows(len(self.narrow.lengths)) + self._num_kl_rows(first)
        return StepRows(
            _dealt(ce, num_chunks), _dealt(self.kl.take(begin, self._num_kl_rows(num_rows)), num_chunks)
        )

    def _num_rows(self, number: int) -> int:
        return min(self.rows, len(self.narrow.lengths) - number * self.rows)

    def _num_kl_rows(self, num_rows: int) -> int:
        """Return the number of KL rows for `num_rows` narrow rows: in proportion, rounded up."""
        return -(-num_rows * self.geometry.kl_batch_size // self.geometry.batch_size)


class StepsByTokens:
    """Optimizer steps of `accumulate x world_size` micro-batches of at most `max_tokens` tokens of both streams.

    Each stream is a line of tokens that is cut into equal shares. A micro-batch takes the rows that begin in its
    share, so it is never longer than its two shares plus the longest row of each stream. The number of shares is
    the smallest multiple of `accumulate x world_size` that keeps this below `max_tokens`, and is the same in every
    epoch. No step is short, and the steps depend only on the product of ranks and accumulation.

    Args:
        narrow: Narrow rows; one cycle is an epoch.
        kl: KL rows; None without a KL stream.
        geometry: Batch sizes and ranks; `max_tokens` must be set.

    Raises:
        ValueError: If `max_tokens` is too small for the rows.
    """

    def __init__(self, narrow: EndlessRows, kl: EndlessRows | None, geometry: BatchGeometry) -> None:
        assert geometry.max_tokens is not None
        self.narrow, self.kl, self.chunks = narrow, kl, geometry.micro_batches_per_step
        self.accumulate = geometry.accumulate
        self.kl_tokens = 0  # KL tokens in an epoch
        if kl is not None:
            rows = len(narrow.lengths) * geometry.kl_batch_size
            self.kl_tokens = max(1, rows * kl.num_tokens // (len(kl.lengths) * geometry.batch_size))
        longest = sum(max(stream.lengths) for stream in (narrow, kl) if stream is not None)
        room = geometry.max_tokens - longest
        if room < 1:
            raise ValueError(
                f"data.max_tokens must be more than the longest rows of both streams together, {longest} tokens, "
                f"got {geometry.max_tokens}; twice as much or more keeps micro-batches full."
            )
        self.num_steps = -(-(narrow.num_tokens + self.kl_tokens) // (room * self.chunks))
        for stream, tokens in ((narrow, narrow.num_tokens), (kl, self.kl_tokens)):
            if stream is not None and tokens // self.num_steps < max(stream.lengths):
                raise ValueError(
                    f"at data.max_tokens {geometry.max_tokens} an optimizer step may get no row of the "
                    f"{stream.name} stream; raise it, or trainer.accumulate_grad_batches."
                )

    def micro_batches(self, number: int) -> int:
        """Number of micro-batches of one rank in an optimizer step; the same for all steps."""
        return self.accumulate

    def step(self, epoch: int, number: int) -> StepRows:
        """Return the rows of one optimizer step of an epoch."""
        total = self.num_steps * self.chunks
        first = epoch * total + number * self.chunks

        def shares(stream: EndlessRows, tokens: int) -> list[list[int]]:
            cuts = [chunk * tokens // total for chunk in range(first, first + self.chunks + 1)]
            return [stream.beginning_in(*cut) for cut in pairwise(cuts)]

        ce = shares(self.narrow, self.narrow.num_tokens)
        return StepRows(ce, [] if self.kl is None else shares(self.kl, self.kl_tokens))


def make_steps(
    narrow_lengths: Sequence[int], kl_lengths: Sequence[int], geometry: BatchGeometry, seed: int
) -> StepsByRows | StepsByTokens:
    """Cut steps by rows or by tokens, depending on `geometry.max_tokens`.

    Args:
        narrow_lengths: Number of tokens of each narrow row.
        kl_lengths: Number of tokens of each KL row; empty without a KL stream.
        geometry: Batch sizes, accumulation and ranks.
        seed: Seed of the order of both streams.
    """
    sizes = {"narrow": (narrow_lengths, geometry.batch_size), "kl": (kl_lengths, geometry.kl_batch_size)}
    streams = {
        name: EndlessRows(lengths, name, seed, rows, geometry.length_buckets or 1)
        for name, (lengths, rows) in sizes.items()
    }
    kind = StepsByRows if geometry.max_tokens is None else StepsByTokens
    return kind(streams["narrow"], streams["kl"] if kl_lengths else None, geometry)


def permutation(num_rows: int, *key: object) -> list[int]:
    """Return a permutation of `num_rows` rows drawn from `key`, with its own generator."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order: list[int] = torch.randperm(num_rows, generator=generator).tolist()
    return order


def _dealt(rows: list[int], num_chunks: int) -> list[list[int]]:
    """Split rows into parts of sizes as equal as possible."""
    cuts = [chunk * len(rows) // num_chunks for chunk in range(num_chunks + 1)]
    return [rows[begin:end] for begin, end in pairwise(cuts)]
