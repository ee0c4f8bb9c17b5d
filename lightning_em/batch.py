"""Batches: rows of different length laid end to end, and what one training step needs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CountedPositions = Literal["response", "all"]


class EncodedRow(NamedTuple):
    """One tokenised conversation; `response_mask` is True on the tokens that training predicts."""

    input_ids: list[int]
    response_mask: list[bool]
    row_id: str


class PaddedRows(NamedTuple):
    """The same rows as a right-padded rectangle, for a model without a padding-free path."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]


@dataclass(frozen=True)
class PackedBatch:
    """Rows laid end to end without padding.

    Attributes:
        input_ids: Token ids of all rows, `[tokens]`.
        response_mask: True on the assistant tokens (end of turn included), `[tokens]`.
        lengths: Tokens of each row, in order.
        row_ids: Where each row comes from, for messages and records.
        is_dummy: Whether no token of it counts, at any choice of positions.
    """

    input_ids: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]
    row_ids: tuple[str, ...]
    is_dummy: bool = False

    @classmethod
    def from_rows(cls, rows: Sequence[EncodedRow]) -> "PackedBatch":
        """Lay `rows` end to end.

        Raises:
            ValueError: If there is no row, or a row without tokens.
        """
        if not rows or any(not row.input_ids for row in rows):
            raise ValueError(f"a batch needs rows with tokens, got {[len(row.input_ids) for row in rows]}.")
        ids = [token for row in rows for token in row.input_ids]
        mask = [flag for row in rows for flag in row.response_mask]
        return cls(
            input_ids=torch.tensor(ids, dtype=torch.long),
            response_mask=torch.tensor(mask, dtype=torch.bool),
            lengths=tuple(len(row.input_ids) for row in rows),
            row_ids=tuple(row.row_id for row in rows),
        )

    @property
    def num_rows(self) -> int:
        """How many rows the batch holds."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), response_mask=self.response_mask.to(device))

    @cached_property
    def cu_seqlens(self) -> Int[Tensor, "batch_plus_one"]:
        """Where each row starts, and where the last one ends; int32, as varlen attention expects."""
        with torch.inference_mode(False):  # made in validation, it may be kept for a backward pass
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            return ends.to(device=self.input_ids.device, dtype=torch.int32)

    @cached_property
    def positions(self) -> Int[Tensor, "tokens"]:
        """Position of each token within its own row."""
        with torch.inference_mode(False):
            return torch.cat([torch.arange(length) for length in self.lengths]).to(self.input_ids.device)

    def row_of_token(self) -> Int[Tensor, "tokens"]:
        """Index of the row each token belongs to."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(self.num_rows), lengths).to(self.input_ids.device)

    def counted(self, kind: CountedPositions) -> Bool[Tensor, "tokens"]:
        """Mark the positions whose next-token distribution counts.

        Args:
            kind: `response`: the next token of the same row is a response token (what cross-entropy
                uses); `all`: every position of every row (the convention of the published KL weights).
        """
        if kind == "all":
            return torch.full_like(self.response_mask, not self.is_dummy)
        shifted = torch.roll(self.response_mask, -1)
        last_of_row = (self.cu_seqlens[1:] - 1).long()
        shifted[last_of_row] = False
        return shifted

    def targets(self) -> Int[Tensor, "tokens"]:
        """The next token at each position; meaningless at the last position of a row."""
        return torch.roll(self.input_ids, -1)

    def padded(self, pad_id: int = 0) -> PaddedRows:
        """The rows as a right-padded rectangle."""
        rows = torch.split(self.input_ids, list(self.lengths))
        ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
        lengths = torch.tensor(self.lengths, device=ids.device)
        attention = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
        return PaddedRows(ids, attention)

    def select(self, rows: Sequence[int]) -> "PackedBatch":
        """Some of the rows, in the order given."""
        ids, masks = (torch.split(t, list(self.lengths)) for t in (self.input_ids, self.response_mask))
        return replace(
            self,
            input_ids=torch.cat([ids[row] for row in rows]),
            response_mask=torch.cat([masks[row] for row in rows]),
            lengths=tuple(self.lengths[row] for row in rows),
            row_ids=tuple(self.row_ids[row] for row in rows),
        )

    def dummy(self) -> "PackedBatch":
        """The same rows with no token that counts: keeps a rank without rows in step and adds 0 to every sum."""
        return replace(self, response_mask=torch.zeros_like(self.response_mask), is_dummy=True)


def single_rows(batch: PackedBatch) -> list[PackedBatch]:
    """Each row of a batch as a batch of its own."""
    parts = zip(
        torch.split(batch.input_ids, list(batch.lengths)),
        torch.split(batch.response_mask, list(batch.lengths)),
        batch.lengths,
        batch.row_ids,
        strict=True,
    )
    return [
        PackedBatch(ids, mask, (length,), (row_id,), batch.is_dummy) for ids, mask, length, row_id in parts
    ]


def concat(batches: Sequence[PackedBatch]) -> PackedBatch:
    """All rows of several batches as one batch."""
    if len(batches) == 1:
        return batches[0]
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        response_mask=torch.cat([batch.response_mask for batch in batches]),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        row_ids=tuple(row_id for batch in batches for row_id in batch.row_ids),
        is_dummy=all(batch.is_dummy for batch in batches),
    )


def token_batches(batches: Iterable[PackedBatch], max_tokens: int) -> Iterator[list[PackedBatch]]:
    """Groups of consecutive batches with a limited number of tokens.

    Args:
        batches: Iterated over once; none is split or left out.
        max_tokens: Most tokens in a group; a batch with more is a group of its own.
    """
    group: list[PackedBatch] = []
    filled = 0
    for batch in batches:
        size = sum(batch.lengths)
        if group and filled + size > max_tokens:
            yield group
            group, filled = [], 0
        group.append(batch)
        filled += size
    if group:
        yield group


class WindowCounts(NamedTuple):
    """Counted tokens of one optimiser step over all its micro-batches and all ranks.

    `kl_all` counts every position of the KL rows, `kl_response` those before a response token.
    """

    ce: int
    kl_response: int
    kl_all: int


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch of both streams with the counts its losses are divided by.

    Attributes:
        ce: Rows of the narrow data.
        kl: Rows of the parallel data; None without a KL stream.
        window: Global counts of the optimiser step this micro-batch belongs to.
    """

    ce: PackedBatch
    kl: PackedBatch | None
    window: WindowCounts

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The same batch on `device`."""
        return replace(self, ce=self.ce.to(device), kl=self.kl.to(device) if self.kl else None)
