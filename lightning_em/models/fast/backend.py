"""The fast backend: from a batch to its losses, by hidden states that are computed once and only where they count.

`HiddenStates` runs the model, `fused_head` turns its states into losses, `immediate_sum` makes the gradient.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import CountedPositions, PackedBatch, concat, single_rows, token_batches
from lightning_em.losses import LossWeights, TokenSum, token_cross_entropy, token_kl
from lightning_em.models.backend import Backend, LossSums, StepLoss, TokenLosses
from lightning_em.models.fast.fused_head import (
    FrozenHead,
    frozen_head,
    head_cross_entropy,
    head_kl,
    unfused_logits,
)
from lightning_em.models.fast.hidden_states import HiddenStates
from lightning_em.models.fast.immediate import immediate_sum
from lightning_em.models.fast.store import ActivationStore

logger = logging.getLogger(__name__)

PART_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Tokens that are differentiated together: a matrix product is at full speed, and more only costs memory."""

CONCAT_TOKENS = 2048
"""Up to this many tokens, both streams of a step or batches of a sweep share a pass: more would gain little."""


@dataclass(frozen=True)
class FastOptions:
    """Parts of the fast backend; all on by default, disable one to benchmark or debug it.

    Attributes:
        split: Run what lies below the adapter once, without autograd, for the tuned model and the reference.
        packed: Lay rows end to end instead of padding them.
        fused: Losses from hidden states in chunks, instead of from logits at the counted positions.
        immediate: Make the gradient of each part of a batch in the forward pass and free its activations.
        part_tokens: Target for the tokens of one part; chosen by device if not given.
    """

    split: bool = True
    packed: bool = True
    fused: bool = True
    immediate: bool = True
    part_tokens: int | None = None


class Part(NamedTuple):
    """Rows that run through the model together, with everything that the adapter does not change.

    Attributes:
        batch: The rows.
        mask: True where a token counts.
        prefix: Hidden states that enter the adapter's lowest layer; None if no layer lies below it.
        head: The output head.
    """

    batch: PackedBatch
    mask: Bool[Tensor, "tokens"]
    prefix: Float[Tensor, "tokens hidden"] | None
    head: FrozenHead


class FastBackend(Backend):
    """Losses from hidden states that are shared between the streams, the reference and a sweep's states.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter; its current scale and values are what the passes use.
        options: Parts of the backend.
        store: Keeps hidden states from one use to the next.
        reference: `cached` keeps the reference's final hidden states in the store too.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        options: FastOptions = FastOptions(),
        store: ActivationStore | None = None,
        reference: Literal["live", "cached"] = "live",
    ) -> None:
        self.base, self.adapter, self.options = base, adapter, options
        self.hidden = HiddenStates(base, adapter, options.split, options.packed, store, reference)
        self._most: Callable[[int], int] | None = None

    def step_loss(
        self, ce: PackedBatch, kl: PackedBatch | None, weights: LossWeights, kl_positions: CountedPositions
    ) -> StepLoss:
        if kl is None or not self._fits_one_pass(ce, kl):
            return self.losses(ce, kl, kl_positions).weighted(weights)
        return self._step_loss_of_one_pass(ce, kl, weights, kl_positions)

    def losses(self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions) -> LossSums:
        ce_rows, kl_rows = self._divided(ce), [] if kl is None else self._divided(kl)
        masks = [rows.counted("response") for rows in ce_rows] + [
            rows.counted(kl_positions) for rows in kl_rows
        ]
        # All parts of both streams share one pass below the adapter: nothing is differentiated there, so that it
        # needs little memory.
        parts = self._prepared([*ce_rows, *kl_rows], masks)
        ce_sum = self._sum(self._ce, parts[: len(ce_rows)])
        return LossSums(ce_sum, None if kl is None else self._sum(self._kl, parts[len(ce_rows) :]))

    def kl_sum(self, kl: PackedBatch, kl_positions: CountedPositions) -> TokenSum:
        rows = self._divided(kl)
        return self._sum(self._kl, self._prepared(rows, [each.counted(kl_positions) for each in rows]))

    def prepare_ce(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        [part] = self._prepared([batch], [mask])
        return partial(self._ce, part)

    def prepare_kl(self, batch: PackedBatch, mask: Bool[Tensor, "tokens"]) -> TokenLosses:
        [part] = self._prepared([batch], [mask])
        return partial(self._kl, part, self._reference(part))

    def grouped(self, batches: Sequence[PackedBatch]) -> Iterable[PackedBatch]:
        together = bool(batches) and self._may_concat(batches[0])
        return map(concat, token_batches(batches, CONCAT_TOKENS if together else 0))

    def compute_in_step(self, most: Callable[[int], int]) -> None:
        self._most = most
        if self.hidden.cache is not None:
            logger.warning("the activation store is off: ranks share the base and must run it in step")
            self.hidden.cache = None

    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        return self.hidden.announce_store(num_tokens, num_reference_tokens)

    # Losses of one part.

    def _ce(self, part: Part) -> Float[Tensor, "counted"]:
        """Cross-entropy at the counted tokens, with the adapter as it is."""
        hidden = self.hidden.final(part.batch, part.mask, part.prefix)
        return self._ce_from(part.head, hidden, part.batch.targets()[part.mask])

    def _kl(
        self, part: Part, reference: Float[Tensor, "counted hidden"] | None = None
    ) -> Float[Tensor, "counted"]:
        """KL from the reference at the counted tokens, with the adapter as it is.

        Args:
            part: The rows.
            reference: Final hidden states of the reference; computed if not given.
        """
        reference = self._reference(part) if reference is None else reference
        hidden = self.hidden.final(part.batch, part.mask, part.prefix)
        return self._kl_from(part.head, reference, hidden)

    def _reference(self, part: Part) -> Float[Tensor, "counted hidden"]:
        return self.hidden.reference(part.batch, part.mask, part.prefix)

    def _ce_from(
        self, head: FrozenHead, hidden: Float[Tensor, "counted hidden"], targets: Int[Tensor, "counted"]
    ) -> Float[Tensor, "counted"]:
        if self.options.fused:
            return head_cross_entropy(head, hidden, targets)
        return token_cross_entropy(unfused_logits(head, hidden), targets)

    def _kl_from(
        self,
        head: FrozenHead,
        reference: Float[Tensor, "counted hidden"],
        hidden: Float[Tensor, "counted hidden"],
    ) -> Float[Tensor, "counted"]:
        if self.options.fused:
            return head_kl(head, reference, hidden)
        return token_kl(unfused_logits(head, reference), unfused_logits(head, hidden))

    # Batches to parts, parts to sums.

    def _divided(self, batch: PackedBatch) -> list[PackedBatch]:
        """Groups of rows to be differentiated one after the other, as many as on every other rank."""
        limit = self.options.part_tokens or PART_TOKENS["cuda" if batch.input_ids.is_cuda else "cpu"]
        rows = [batch]
        if self.options.immediate and sum(batch.lengths) > limit:
            rows = [concat(group) for group in token_batches(single_rows(batch), limit)]
        if self._most is None:
            return rows
        # A rank that has fewer parts than another makes up for it with dummies: in FSDP every pass gathers the
        # blocks of all ranks, and one that makes fewer passes leaves the others waiting for ever.
        return rows + [single_rows(batch)[0].dummy()] * (self._most(len(rows)) - len(rows))

    def _prepared(self, batches: Sequence[PackedBatch], masks: Sequence[Tensor]) -> list[Part]:
        """The batches as parts; one pass below the adapter serves them all."""
        head, prefix = frozen_head(self.base), self.hidden.prefix(concat(batches))
        prefixes: Sequence[Tensor | None] = [None] * len(batches)
        if prefix is not None:
            prefixes = torch.split(prefix, [sum(batch.lengths) for batch in batches])
        return [Part(*each, head) for each in zip(batches, masks, prefixes, strict=True)]

    def _sum(self, loss: Callable[[Part], Tensor], parts: Sequence[Part]) -> TokenSum:
        """Sum of a per-token loss over all parts, and how many tokens count."""
        count = int(torch.stack([part.mask.sum() for part in parts]).sum())
        runs = [partial(loss, part) for part in parts]
        if not self.options.immediate:
            return TokenSum(torch.stack([run().sum() for run in runs]).sum(), count)
        return TokenSum(immediate_sum(runs, list(self.adapter.trainable().values())), count)

    # Both streams in one tuned pass.

    def _fits_one_pass(self, ce: PackedBatch, kl: PackedBatch) -> bool:
        """Whether both streams are so short that together they fill the device better."""
        if not self.options.immediate or not self._may_concat(ce):
            return False
        # The live reference has to have the shape of the tuned pass (see below) and so runs over the narrow rows
        # for nothing. On a GPU that costs less than a second tuned pass, which waits for kernels to be launched.
        if self.hidden.reference_is_live and not _waits_for_launches(ce):
            return False
        return not (ce.is_dummy or kl.is_dummy) and sum(ce.lengths) + sum(kl.lengths) <= CONCAT_TOKENS

    def _may_concat(self, batch: PackedBatch) -> bool:
        # Ranks that run in step have different batches, and would not agree on the number of passes. Padded rows
        # would be padded further.
        return self._most is None and self.hidden.packs(batch)

    def _step_loss_of_one_pass(
        self, ce: PackedBatch, kl: PackedBatch, weights: LossWeights, kl_positions: CountedPositions
    ) -> StepLoss:
        ce_mask, kl_mask = ce.counted("response"), kl.counted(kl_positions)
        counts = [int(mask.sum()) for mask in (ce_mask, kl_mask)]
        [part] = self._prepared([concat([ce, kl])], [torch.cat([ce_mask, kl_mask])])
        detached: list[Tensor] = []

        def weighted() -> Tensor:
            if self.hidden.reference_is_live:
                # Over the narrow rows too: matrix products of another shape round differently, and the KL of an
                # adapter without effect would not be exactly 0.
                mask = torch.cat([torch.zeros_like(ce_mask), kl_mask])
                reference = self.hidden.reference(part.batch, mask, part.prefix)
            else:
                own = None if part.prefix is None else part.prefix[len(ce_mask) :]
                reference = self.hidden.reference(kl, kl_mask, own)
            hidden = self.hidden.final(part.batch, part.mask, part.prefix)
            of_ce, of_kl = torch.split(hidden, counts)
            ce_values = self._ce_from(part.head, of_ce, ce.targets()[ce_mask])
            sums = torch.stack([ce_values.sum(), self._kl_from(part.head, reference, of_kl).sum()])
            detached.append(sums.detach())
            return sums * sums.new_tensor(weights)

        total = immediate_sum([weighted], list(self.adapter.trainable().values()))
        ce_total, kl_total = detached[0].unbind()
        return StepLoss(total, TokenSum(ce_total, counts[0]), TokenSum(kl_total, counts[1]))


def _waits_for_launches(batch: PackedBatch) -> bool:
    """Whether one pass over short batches saves more than it costs to compute some rows for nothing."""
    return batch.input_ids.is_cuda
