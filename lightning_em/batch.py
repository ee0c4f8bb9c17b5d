"""Packed batches of rows of different length, and the micro-batch of a training step."""

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
    """One tokenized conversation; `response_mask` is True on the tokens that training predicts."""

    input_ids: list[int]
    response_mask: list[bool]
    row_id: str


class PaddedRows(NamedTuple):
    """Right-padded rows, for models that cannot run on packed rows."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]


@dataclass(frozen=True)
class PackedBatch:
    """Rows concatenated without padding.

    Attributes:
        input_ids: Token ids of all rows, `[tokens]`.
        response_mask: True on the assistant tokens (end of turn included), `[tokens]`.
        lengths: Number of tokens in each row, in order.
        row_ids: Id of each row, for messages and records.
        is_dummy: Whether no token counts, for any choice of counted positions.
    """

    input_ids: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]
    row_ids: tuple[str, ...]
    is_dummy: bool = False

    @classmethod
    def from_rows(cls, rows: Sequence[EncodedRow]) -> "PackedBatch":
        """Concatenate rows.

        Raises:
            ValueError: If `rows` is empty, or a row has no tokens.
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
        """Number of rows in the batch."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the same batch on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), response_mask=self.response_mask.to(device))

    @cached_property
    def cu_seqlens(self) -> Int[Tensor, "batch_plus_one"]:
        """Start of each row and end of the last row; int32, as varlen attention expects."""
        # The tensor is cached. If validation created it in inference mode, no later backward pass could save it.
        with torch.inference_mode(False):
            ends = torch.tensor((0, *self.lengths)).cumsum(0)
            return ends.to(device=self.input_ids.device, dtype=torch.int32)

    @cached_property
    def positions(self) -> Int[Tensor, "tokens"]:
        """Position of each token within its own row."""
        with torch.inference_mode(False):
            return torch.cat([torch.arange(length) for length in self.lengths]).to(self.input_ids.device)

    def row_of_token(self) -> Int[Tensor, "tokens"]:
        """Return the index of the row that each token belongs to."""
        lengths = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(self.num_rows), lengths).to(self.input_ids.device)

    def counted(self, kind: CountedPositions) -> Bool[Tensor, "tokens"]:
        """Mark the positions whose next-token distribution counts.

        Args:
            kind: `response` marks positions whose next token in the same row is a response token; the cross-entropy
                uses these. `all` marks every position of every row, the convention of the published KL weights.
        """
        if kind == "all":
            return torch.full_like(self.response_mask, not self.is_dummy)
        shifted = torch.roll(self.response_mask, -1)
        last_of_row = (self.cu_seqlens[1:] - 1).long()
        shifted[last_of_row] = False
        return shifted

    def targets(self) -> Int[Tensor, "tokens"]:
        """Return the next token at each position; the last position of a row has no valid target."""
        return torch.roll(self.input_ids, -1)

    def padded(self, pad_id: int = 0) -> PaddedRows:
        """Return the rows as right-padded tensors."""
        rows = torch.split(self.input_ids, list(self.lengths))
        ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
        lengths = torch.tensor(self.lengths, device=ids.device)
        attention = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
        return PaddedRows(ids, attention)

    def select(self, rows: Sequence[int]) -> "PackedBatch":
        """Return the rows with the given indices, in the given order."""
        ids, masks = (torch.split(t, list(self.lengths)) for t in (self.input_ids, self.response_mask))
        return replace(
            self,
            input_ids=torch.cat([ids[row] for row in rows]),
            response_mask=torch.cat([masks[row] for row in rows]),
            lengths=tuple(self.lengths[row] for row in rows),
            row_ids=tuple(self.row_ids[row] for row in rows),
        )

    def dummy(self) -> "PackedBatch":
        """Return a dummy batch: the same rows, but no token counts.

        A rank without rows of its own uses it to run the same passes as the other ranks. It adds 0 to every sum.
        """
        return replace(self, response_mask=torch.zeros_like(self.response_mask), is_dummy=True)


def single_rows(batch: PackedBatch) -> list[PackedBatch]:
    """Split a batch into batches of one row."""
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
    """Concatenate the rows of several batches to one batch."""
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
    """Group consecutive batches up to a limited number of tokens.

    Args:
        batches: Batches to group; iterated over once. No batch is split or dropped.
        max_tokens: Maximum number of tokens in a group. A batch with more tokens forms a group of its own.
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


class StepCounts(NamedTuple):
    """Counted tokens of one optimizer step over all its micro-batches and all ranks.

    `kl_all` counts every position of the KL rows; `kl_response` counts the positions that predict a response token.
    """

    ce: int
    kl_response: int
    kl_all: int


@dataclass(frozen=True)
class TrainBatch:
    """One micro-batch of both streams, with the counts that its losses are divided by.

    Attributes:
        ce: Rows of the narrow data.
        kl: Rows of the KL data; None without a KL stream.
        step_counts: Counted tokens of the whole optimizer step that this micro-batch belongs to.
    """

    ce: PackedBatch
    kl: PackedBatch | None
    step_counts: StepCounts

    def to(self, device: torch.device | str) -> "TrainBatch":
        """Return the same batch on `device`."""
        return replace(self, ce=self.ce.to(device), kl=self.kl.to(device) if self.kl else None)
