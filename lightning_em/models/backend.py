"""What a model computes its losses with: the interface of both backends, and what they return."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_em.batch import CountedPositions, PackedBatch
from lightning_em.losses import LossWeights, TokenSum

AdapterState = Callable[[], AbstractContextManager[object]]
"""Puts the adapter into one state of a sweep while the context that it returns is open."""

TokenLosses = Callable[[], Tensor]
"""Computes the losses of some tokens, `[counted]`, with the adapter in the state that it is in when called."""


class StepLoss(NamedTuple):
    """The loss of one micro-batch to backpropagate, with the sums it is made of.

    Attributes:
        total: Weighted sum of both losses, with its gradient.
        ce: Sum without a gradient.
        kl: Sum without a gradient; None without a KL batch.
    """

    total: Tensor
    ce: TokenSum
    kl: TokenSum | None


class LossSums(NamedTuple):
    """Both losses of one micro-batch, each with its gradient; `kl` is None without a KL batch."""

    ce: TokenSum
    kl: TokenSum | None

    def weighted(self, weights: LossWeights) -> StepLoss:
        """Multiply each sum by its weight and add them up."""
        ce = TokenSum(self.ce.total.detach(), self.ce.count)
        if self.kl is None:
            return StepLoss(weights.ce * self.ce.total, ce, None)
        total = weights.ce * self.ce.total + weights.kl * self.kl.total
        return StepLoss(total, ce, TokenSum(self.kl.total.detach(), self.kl.count))


class RowLosses(NamedTuple):
    """Loss of each row, without a gradient.

    Attributes:
        sums: Nats summed over the counted tokens of each row, float64.
        counts: Counted tokens of each row.
    """

    sums: Float[Tensor, "batch"]
    counts: Float[Tensor, "batch"]

    @classmethod
    def of_tokens(
        cls, batch: PackedBatch, mask: Bool[Tensor, "tokens"], values: Float[Tensor, "counted"]
    ) -> "RowLosses":
        """Sum the losses of the masked tokens by row."""
        rows = batch.row_of_token()[mask]
        empty = torch.zeros(batch.num_rows, dtype=torch.float64, device=values.device)
        sums = empty.index_add(0, rows, values.double())
        counts = empty.index_add(0, rows, torch.ones_like(values, dtype=torch.float64))
        return cls(sums, counts)

    @classmethod
    def concat(cls, parts: Sequence["RowLosses"]) -> "RowLosses":
        """All rows of several batches.

        Raises:
            ValueError: If there is no batch.
        """
        if not parts:
            raise ValueError("there is no row to measure on; give the probe at least one example.")
        return cls(torch.cat([part.sums for part in parts]), torch.cat([part.counts for part in parts]))


class Backend(ABC):
    """Losses of a frozen base with its adapter, in the adapter's current state: its scale and its values.

    `PlainBackend` is the oracle, `FastBackend` gives the same numbers up to rounding. A KL is measured from the
    reference, which is the same model at scale 0.
    """

    @abstractmethod
    def step_loss(
        self, ce: PackedBatch, kl: PackedBatch | None, weights: LossWeights, kl_positions: CountedPositions
    ) -> StepLoss:
        """Weighted sum of the cross-entropy on one batch and the KL on another."""

    @abstractmethod
    def losses(self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions) -> LossSums:
        """The two sums, each with a gradient of its own."""

    @abstractmethod
    def kl_sum(self, kl: PackedBatch, kl_positions: CountedPositions) -> TokenSum:
        """The KL alone, with its gradient."""

    @abstractmethod
    def prepare_ce(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        """Cross-entropy at the masked tokens, for several states of the adapter: what they share is computed here."""

    @abstractmethod
    def prepare_kl(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        """KL at the masked tokens, for several states of the adapter: the reference runs here."""

    @abstractmethod
    def grouped(self, batches: Sequence[PackedBatch]) -> Iterable[PackedBatch]:
        """The same rows in the same order, in the batches in which a sweep runs fastest."""

    @abstractmethod
    def compute_in_step(self, most: Callable[[int], int]) -> None:
        """From now on make as many passes through the base as the rank that needs the most.

        Args:
            most: Returns the largest of all ranks' numbers; every rank has to call it.
        """

    @abstractmethod
    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        """Log what the activation store will take at most; returns the bytes, 0 without a store."""
