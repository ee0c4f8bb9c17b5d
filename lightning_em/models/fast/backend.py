"""The fast backend: losses of a batch from hidden states that are computed once, and only where they are needed.

`HiddenStates` runs the model, `fused_head` computes the losses from its hidden states, and `immediate_sum` computes
the gradient.
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
"""Tokens per part. A matrix product reaches full speed at this size; larger parts only cost memory."""

CONCAT_TOKENS = 2048
"""Up to this many tokens, the two streams of a step, or the batches of a sweep, share one forward pass.

Above this number of tokens, sharing a pass gains little.
"""


@dataclass(frozen=True)
class FastOptions:
    """Optimizations of the fast backend. All are on by default; disable one to benchmark or debug it.

    Attributes:
        split: Run the layers below the adapter once, without autograd, for the tuned model and the reference.
        packed: Concatenate rows instead of padding them.
        fused: Compute losses from hidden states in chunks, instead of from all logits at the counted positions.
        immediate: Compute the gradient of each part of a batch in the forward pass, then free its activations.
        part_tokens: Target number of tokens in one part; depends on the device if not given.
    """

    split: bool = True
    packed: bool = True
    fused: bool = True
    immediate: bool = True
    part_tokens: int | None = None


class Part(NamedTuple):
    """Rows that run through the model together, with the inputs that do not depend on the adapter.

    Attributes:
        batch: The rows.
        mask: True where a token counts.
        prefix: Hidden states that enter the adapter's lowest layer; None without a shared prefix.
        head: The output head.
    """

    batch: PackedBatch
    mask: Bool[Tensor, "tokens"]
    prefix: Float[Tensor, "tokens hidden"] | None
    head: FrozenHead


class FastBackend(Backend):
    """Computes losses from hidden states that the two streams, the reference and the states of a sweep share.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter. Each pass uses its current scale and values.
        options: Which optimizations are on.
        store: Store that keeps hidden states for later passes.
        reference: `cached` also keeps the final hidden states of the reference in the store.
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
        # All parts of both streams share one pass below the adapter. It runs without autograd and stores no
        # activations, so its memory use is small.
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

    def use_lockstep(self, most: Callable[[int], int]) -> None:
        self._most = most
        if self.hidden.cache is not None:
            logger.warning("the activation store is off: ranks share the base and must run it in step")
            self.hidden.cache = None

    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        return self.hidden.announce_store(num_tokens, num_reference_tokens)

    # Losses of one part.

    def _ce(self, part: Part) -> Float[Tensor, "counted"]:
        """Compute the cross-entropy at the counted tokens in the adapter's current state."""
        hidden = self.hidden.final(part.batch, part.mask, part.prefix)
        return self._ce_from(part.head, hidden, part.batch.targets()[part.mask])

    def _kl(
        self, part: Part, reference: Float[Tensor, "counted hidden"] | None = None
    ) -> Float[Tensor, "counted"]:
        """Compute D_KL(reference || tuned) at the counted tokens in the adapter's current state.

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

    # From batches to parts, and from parts to sums.

    def _divided(self, batch: PackedBatch) -> list[PackedBatch]:
        """Divide a batch into groups of rows that are differentiated one after another.

        In lockstep mode (`use_lockstep`) every rank returns the same number of groups.
        """
        limit = self.options.part_tokens or PART_TOKENS["cuda" if batch.input_ids.is_cuda else "cpu"]
        rows = [batch]
        if self.options.immediate and sum(batch.lengths) > limit:
            rows = [concat(group) for group in token_batches(single_rows(batch), limit)]
        if self._most is None:
            return rows
        # A rank with fewer parts than another adds dummy batches. With FSDP every pass is a collective that gathers
        # the weights of each block; a rank that runs fewer passes makes the other ranks wait forever.
        return rows + [single_rows(batch)[0].dummy()] * (self._most(len(rows)) - len(rows))

    def _prepared(self, batches: Sequence[PackedBatch], masks: Sequence[Tensor]) -> list[Part]:
        """Make one part from each batch; all of them share one pass below the adapter."""
        head, prefix = frozen_head(self.base), self.hidden.prefix(concat(batches))
        prefixes: Sequence[Tensor | None] = [None] * len(batches)
        if prefix is not None:
            prefixes = torch.split(prefix, [sum(batch.lengths) for batch in batches])
        return [Part(*each, head) for each in zip(batches, masks, prefixes, strict=True)]

    def _sum(self, loss: Callable[[Part], Tensor], parts: Sequence[Part]) -> TokenSum:
        """Sum a per-token loss over all parts, and count the tokens."""
        count = int(torch.stack([part.mask.sum() for part in parts]).sum())
        runs = [partial(loss, part) for part in parts]
        if not self.options.immediate:
            return TokenSum(torch.stack([run().sum() for run in runs]).sum(), count)
        return TokenSum(immediate_sum(runs, list(self.adapter.trainable().values())), count)

    # Both streams in one pass of the tuned model.

    def _fits_one_pass(self, ce: PackedBatch, kl: PackedBatch) -> bool:
        """Whether both streams are short enough to share one pass of the tuned model."""
        if not self.options.immediate or not self._may_concat(ce):
            return False
        # The live reference must have the shape of the tuned pass (see `_step_loss_of_one_pass`), so it also runs
        # over the narrow rows, whose reference states are discarded. On a GPU this costs less than a second tuned
        # pass, because short passes are bound by kernel launches.
        if self.hidden.reference_is_live and not _waits_for_launches(ce):
            return False
        return not (ce.is_dummy or kl.is_dummy) and sum(ce.lengths) + sum(kl.lengths) <= CONCAT_TOKENS

    def _may_concat(self, batch: PackedBatch) -> bool:
        # In lockstep mode each rank has its own batches, so the ranks could disagree on the number of passes.
        # Padded rows would need more padding in a larger batch.
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
                # The reference runs over the narrow rows too. Matrix products of a different shape round
                # differently, so the KL of an adapter without effect would not be exactly 0.
                mask = torch.cat([torch.zeros_like(ce_mask), kl_mask])
                reference = self.hidden.reference(part.batch, mask, part.prefix)
            else:
                own = None if part.prefix is None else part.prefix[len(ce_mask) :]
                reference = self.hidden.reference(kl, kl_mask, own)
            hidden = self.hidden.final(part.batch, part.mask, part.prefix)
            of_ce, of_kl = torch.split(hidden, counts)
            ce_values = self._ce_from(part.head, of_ce, ce.targets()[ce_mask])
            sums = torch.stack([ce_values.sum(), self._kl_from(part.head, reference, of_kl).sum()])
            # `immediate_sum` returns only the weighted total; the two sums for logging leave through `detached`.
            detached.append(sums.detach())
            return sums * sums.new_tensor(weights)

        total = immediate_sum([weighted], list(self.adapter.trainable().values()))
        ce_total, kl_total = detached[0].unbind()
        return StepLoss(total, TokenSum(ce_total, counts[0]), TokenSum(kl_total, counts[1]))


def _waits_for_launches(batch: PackedBatch) -> bool:
    """Whether saving one pass over short batches outweighs the cost of reference states that are discarded."""
    return batch.input_ids.is_cuda
