"""The interface of the backends that compute losses, and the types that they return."""

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
"""Returns a context manager that puts the adapter into one state of a sweep while it is open."""

TokenLosses = Callable[[], Tensor]
"""Computes per-token losses, `[counted]`, in the state that the adapter has at the time of the call."""


class StepLoss(NamedTuple):
    """The loss of one micro-batch, with the two sums it consists of.

    Attributes:
        total: Weighted sum of both losses, with its gradient.
        ce: Unweighted cross-entropy, without a gradient.
        kl: Unweighted KL, without a gradient; None without a KL batch.
    """

    total: Tensor
    ce: TokenSum
    kl: TokenSum | None


class LossSums(NamedTuple):
    """The two losses of one micro-batch, each with its gradient; `kl` is None without a KL batch."""

    ce: TokenSum
    kl: TokenSum | None

    def weighted(self, weights: LossWeights) -> StepLoss:
        """Multiply each sum by its weight and add the products."""
        ce = TokenSum(self.ce.total.detach(), self.ce.count)
        if self.kl is None:
            return StepLoss(weights.ce * self.ce.total, ce, None)
        total = weights.ce * self.ce.total + weights.kl * self.kl.total
        return StepLoss(total, ce, TokenSum(self.kl.total.detach(), self.kl.count))


class RowLosses(NamedTuple):
    """Loss of each row, without a gradient.

    Attributes:
        sums: Loss in nats, summed over the counted tokens of each row, float64.
        counts: Number of counted tokens in each row, float64.
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
        """Concatenate the rows of several batches.

        Raises:
            ValueError: If `parts` is empty.
        """
        if not parts:
            raise ValueError("there is no row to measure on; give the probe at least one example.")
        return cls(torch.cat([part.sums for part in parts]), torch.cat([part.counts for part in parts]))


class Backend(ABC):
    """Computes losses of a frozen base model with an adapter, in the adapter's current state (scale and values).

    `PlainBackend` is the test oracle. `FastBackend` gives the same numbers up to rounding. The KL is
    D_KL(reference || tuned), where the reference is the same model at scale 0.
    """

    @abstractmethod
    def step_loss(
        self, ce: PackedBatch, kl: PackedBatch | None, weights: LossWeights, kl_positions: CountedPositions
    ) -> StepLoss:
        """Compute the weighted sum of the cross-entropy on one batch and the KL on another."""

    @abstractmethod
    def losses(self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions) -> LossSums:
        """Compute the two sums separately, each with its own gradient."""

    @abstractmethod
    def kl_sum(self, kl: PackedBatch, kl_positions: CountedPositions) -> TokenSum:
        """Compute only the KL, with its gradient."""

    @abstractmethod
    def prepare_ce(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        """Prepare the cross-entropy at the masked tokens for several adapter states; compute what they share."""

    @abstractmethod
    def prepare_kl(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        """Prepare the KL at the masked tokens for several adapter states; run the reference."""

    @abstractmethod
    def grouped(self, batches: Sequence[PackedBatch]) -> Iterable[PackedBatch]:
        """Regroup the rows, in the same order, into the batches in which a sweep runs fastest."""

    @abstractmethod
    def use_lockstep(self, most: Callable[[int], int]) -> None:
        """Make every rank run the same number of passes through the base model from now on.

        Args:
            most: Returns the maximum of its argument over all ranks; every rank must call it.
        """

    @abstractmethod
    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        """Log the largest size that the activation store can reach; return it in bytes, 0 without a store."""
