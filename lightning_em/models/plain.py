"""The plain backend: full forward passes, full logits, autograd. The fast backend is tested against it."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import CountedPositions, PackedBatch, PaddedRows
from lightning_em.losses import (
    LossWeights,
    TokenSum,
    cross_entropy,
    kl_from_reference,
    token_cross_entropy,
    token_kl,
)
from lightning_em.models.backend import Backend, LossSums, StepLoss, TokenLosses
from lightning_em.models.padding import run_padded


def full_logits(base: PreTrainedModel, batch: PackedBatch) -> Float[Tensor, "tokens vocab"]:
    """Compute the logits at every token of a batch by forward passes over padded rows, in the base model's dtype.

    One pass is enough, unless the numbers of a row depend on the rows it is padded with: see `run_padded`.
    """

    def run(rows: PaddedRows) -> Tensor:
        logits: Tensor = base(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False
        ).logits
        return logits

    return run_padded(base, batch, run)


class PlainBackend(Backend):
    """Computes each loss by its formula from the full logits of the model.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter; its scale is set to 0 for the reference.
    """

    def __init__(self, base: PreTrainedModel, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter

    @torch.no_grad()
    def _reference_logits(self, batch: PackedBatch) -> Float[Tensor, "tokens vocab"]:
        with self.adapter.at_scale(0.0):
            return full_logits(self.base, batch)

    def step_loss(
        self, ce: PackedBatch, kl: PackedBatch | None, weights: LossWeights, kl_positions: CountedPositions
    ) -> StepLoss:
        return self.losses(ce, kl, kl_positions).weighted(weights)

    def losses(self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions) -> LossSums:
        ce_sum = cross_entropy(full_logits(self.base, ce), ce.targets(), ce.counted("response"))
        return LossSums(ce_sum, None if kl is None else self.kl_sum(kl, kl_positions))

    def kl_sum(self, kl: PackedBatch, kl_positions: CountedPositions) -> TokenSum:
        reference = self._reference_logits(kl)
        return kl_from_reference(reference, full_logits(self.base, kl), kl.counted(kl_positions))

    def prepare_ce(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        targets = batch.targets()[mask]
        return lambda: token_cross_entropy(full_logits(self.base, batch)[mask], targets)

    def prepare_kl(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        reference = self._reference_logits(batch)[mask]
        return lambda: token_kl(reference, full_logits(self.base, batch)[mask])

    def grouped(self, batches: Sequence[PackedBatch]) -> Iterable[PackedBatch]:
        return batches

    def use_lockstep(self, most: Callable[[int], int]) -> None:
        """Do nothing: this backend never divides a batch, so all ranks run the same number of passes."""

    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        return 0
