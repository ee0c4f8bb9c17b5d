"""What a model gives for batches: losses of a micro-batch, of a step, and of each row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_em.batch import PackedBatch
from lightning_em.losses import TokenSum


class LossSums(NamedTuple):
    """Sums of one micro-batch; `kl` is None where no KL was asked for."""

    ce: TokenSum
    kl: TokenSum | None


class StepLoss(NamedTuple):
    """Both sums of one micro-batch, weighted.

    Attributes:
        total: With its gradient.
        ce: Without one, as is `kl`.
        kl: None where no KL was asked for.
    """

    total: Tensor
    ce: TokenSum
    kl: TokenSum | None


class RowLosses(NamedTuple):
    """Loss of each row of a batch, detached.

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

    def split(self, sizes: Sequence[int]) -> list["RowLosses"]:
        """Those of the first rows, of the next and so on, as many as `sizes` say."""
        parts = zip(*(torch.split(tensor, list(sizes)) for tensor in (self.sums, self.counts)), strict=True)
        return [RowLosses(*part) for part in parts]
