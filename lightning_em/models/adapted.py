"""A frozen base and an adapter as one model, with the losses measured on it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import CountedPositions, PackedBatch, joined, neighbours, single_rows
from lightning_em.losses import LossWeights, TokenSum
from lightning_em.models.engine import Engine, EngineOptions
from lightning_em.models.fallback import chosen_options
from lightning_em.models.immediate import immediate_sum
from lightning_em.models.passes import Passes
from lightning_em.models.results import LossSums, RowLosses, StepLoss
from lightning_em.models.store import ActivationStore

logger = logging.getLogger(__name__)

JOINED_TOKENS = 2048
"""Up to so many tokens, of both streams or of a sweep's batches, share a pass: more would gain little."""


Point = Callable[[], AbstractContextManager[object]]
"""Puts the adapter into one state of a sweep while the context it returns is open."""


class AdaptedModel(nn.Module):
    """The base with its adapter. The reference is this same model at scale 0, never a second copy.

    Args:
        base: A causal language model; frozen and kept in eval mode from here on.
        adapter: Not attached yet.
        seed: Of the adapter's random initial values.
        engine: `auto`: the fast path where it is verified; `plain`: full forward passes and full logits,
            what the fast path is tested against; or parts of the fast path by name.
        store: Keeps hidden states of the frozen base from one use to the next.
        reference: `live`: run the reference each time, exactly 0 KL for an adapter without effect;
            `cached`: keep its final hidden states in the store, exact up to rounding of the last digits.

    Raises:
        ValueError: If the reference is to be cached without a store.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        seed: int = 0,
        engine: Literal["auto", "plain"] | EngineOptions = "auto",
        store: ActivationStore | None = None,
        reference: Literal["live", "cached"] = "live",
    ) -> None:
        if reference == "cached" and store is None:
            raise ValueError(
                "reference is cached, but there is no store; set model.store or reference: live."
            )
        super().__init__()
        self.base = base.eval()
        self.adapter = adapter
        adapter.bind(base, seed)
        self._most: Callable[[int], int] | None = None
        options = chosen_options(base, engine)
        self._engine: Engine | None = None
        if options is not None:
            self._engine = Engine(base, adapter, options, store, reference)
            logger.info("fast path: split at layer %d of %d", *self._engine.split.place)
        elif store is not None:
            logger.warning("the plain path does not use the activation store, and the reference runs live")

    @property
    def vocab_size(self) -> int:
        """Vocabulary size in the model's config (what published KL weights were divided by)."""
        return int(self.base.config.get_text_config(decoder=True).vocab_size)

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Switch the adapter; the frozen base stays in eval mode whoever asks."""
        super().train(mode)
        self.base.eval()
        return self

    def logits(self, batch: PackedBatch, scale: float = 1.0) -> Float[Tensor, "tokens vocab"]:
        """Logits at every token of the batch, in the base's own dtype, from one full forward pass.

        Args:
            batch: Rows laid end to end.
            scale: Of the adapter; 0 is the frozen base to the bit.
        """
        rows = batch.padded()
        with self.adapter.at_scale(scale):
            output = self.base(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        logits: Tensor = output.logits[rows.attention_mask.bool()]
        return logits

    def announce_store(self, num_tokens: int, num_reference_tokens: int = 0) -> int:
        """Say what the activation store will take for a data set at most, before it is filled.

        Args:
            num_tokens: Tokens of all rows of both streams.
            num_reference_tokens: Counted tokens of the KL rows.

        Returns:
            Bytes; 0 if nothing is stored.
        """
        engine = self._engine
        if engine is None or engine.store is None:
            return 0
        tokens = engine.has_prefix * num_tokens + engine.cache_reference * num_reference_tokens
        engine.store.announce(tokens * engine.bytes_per_token, f"hidden states of {tokens} tokens")
        return tokens * engine.bytes_per_token

    def losses(
        self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions = "response"
    ) -> LossSums:
        """Cross-entropy on one batch and KL from the reference on another, at scale 1.

        Args:
            ce: Rows of the narrow data.
            kl: Rows of the parallel data; None leaves the KL out.
            kl_positions: Where the KL counts.
        """
        ce_parts = self._parts(ce)
        kl_parts = [] if kl is None else self._parts(kl)
        passes = self._passes([*ce_parts, *kl_parts])
        with self.adapter.at_scale(1.0):
            ce_masks = [part.counted("response") for part in ce_parts]
            ce_sum = self._sum(passes.cross_entropy, 0, ce_masks)
            if kl is None:
                return LossSums(ce_sum, None)
            kl_masks = [part.counted(kl_positions) for part in kl_parts]
            return LossSums(ce_sum, self._sum(passes.kl, len(ce_parts), kl_masks))

    def step_loss(
        self,
        ce: PackedBatch,
        kl: PackedBatch | None,
        weights: LossWeights,
        kl_positions: CountedPositions = "response",
    ) -> StepLoss:
        """The two sums of `losses`, weighted beforehand: short batches then need one tuned pass, not two.

        Args:
            ce: Rows of the narrow data.
            kl: Rows of the parallel data; None leaves the KL out.
            weights: Of the sums.
            kl_positions: Where the KL counts.
        """
        if kl is None or not self._fits_one_pass(ce, kl):
            sums = self.losses(ce, kl, kl_positions)
            total = weights.ce * sums.ce.total
            if sums.kl is None:
                return StepLoss(total, _constant(sums.ce), None)
            return StepLoss(total + weights.kl * sums.kl.total, _constant(sums.ce), _constant(sums.kl))
        ce_mask, kl_mask = ce.counted("response"), kl.counted(kl_positions)
        passes, found = self._passes([ce, kl]), []

        def weighted() -> Tensor:
            sums = torch.stack([values.sum() for values in passes.both(ce_mask, kl_mask)])
            found.append(sums.detach())
            return sums * sums.new_tensor(weights)

        with self.adapter.at_scale(1.0):
            total = immediate_sum([weighted], list(self.adapter.trainable().values()))
        (ce_total, kl_total), counts = found[0].unbind(), [int(mask.sum()) for mask in (ce_mask, kl_mask)]
        return StepLoss(total, TokenSum(ce_total, counts[0]), TokenSum(kl_total, counts[1]))

    def _fits_one_pass(self, ce: PackedBatch, kl: PackedBatch) -> bool:
        """Whether both streams are so short that together they fill the device better."""
        if self._engine is None or not self._engine.options.immediate or not self._may_join(ce):
            return False
        if self._engine.reference_is_live and not _waits_for_launches(ce):
            return False  # a live reference of the same shape would have to run over the narrow rows too
        return not (ce.is_ghost or kl.is_ghost) and sum(ce.lengths) + sum(kl.lengths) <= JOINED_TOKENS

    def _may_join(self, batch: PackedBatch) -> bool:
        """Not where ranks run in step, whose batches differ, nor where rows are padded and would be further."""
        return self._engine is not None and self._most is None and self._engine.packs(batch)

    def kl_sum(self, batch: PackedBatch, kl_positions: CountedPositions = "response") -> TokenSum:
        """KL from the reference alone, at scale 1, with its gradient; see `losses`."""
        parts = self._parts(batch)
        passes = self._passes(parts)
        with self.adapter.at_scale(1.0):
            return self._sum(passes.kl, 0, [part.counted(kl_positions) for part in parts])

    def compute_in_step(self, most: Callable[[int], int]) -> None:
        """From now on take as many passes as the rank with the most: the base's weights are gathered in each.

        The activation store is off then, for a pass that one rank is spared would keep the others waiting.

        Args:
            most: Gives the largest of all ranks' numbers, called by every rank.
        """
        self._most = most
        if self._engine is not None and self._engine.store is not None:
            logger.warning("the activation store is off: ranks share the base and must run it in step")
            self._engine.store = None

    def _passes(self, batches: Sequence[PackedBatch]) -> Passes:
        return Passes(self._engine, self.adapter, self.logits, batches)

    def _parts(self, batch: PackedBatch) -> list[PackedBatch]:
        parts = [batch] if self._engine is None else self._engine.parts(batch)
        missing = 0 if self._most is None else self._most(len(parts)) - len(parts)
        return parts + [single_rows(batch)[0].ghost()] * missing

    def _sum(self, loss: Callable[[int, Tensor], Tensor], first: int, masks: Sequence[Tensor]) -> TokenSum:
        """Sum a per-token loss over the batches of `Passes` from number `first` on, one mask each."""
        count = int(torch.stack([mask.sum() for mask in masks]).sum())
        runs = [partial(loss, first + index, mask) for index, mask in enumerate(masks)]
        if self._engine is None or not self._engine.options.immediate:
            return TokenSum(torch.stack([run().sum() for run in runs]).sum(), count)
        return TokenSum(immediate_sum(runs, list(self.adapter.trainable().values())), count)

    def row_ce(self, batch: PackedBatch, scale: float = 1.0) -> RowLosses:
        """Cross-entropy of each row over its response tokens."""
        return self.sweep_row_ce([batch], [partial(self.adapter.at_scale, scale)])[0][0]

    def row_kl(
        self, batch: PackedBatch, scale: float = 1.0, kl_positions: CountedPositions = "response"
    ) -> RowLosses:
        """D_KL(reference || tuned) of each row."""
        return self.sweep_row_kl([batch], [partial(self.adapter.at_scale, scale)], kl_positions)[0][0]

    @torch.no_grad()
    def sweep_row_ce(self, batches: Iterable[PackedBatch], points: Sequence[Point]) -> list[list[RowLosses]]:
        """Cross-entropy of each row in each state of the adapter; what lies below it runs once.

        Neighbouring batches up to `JOINED_TOKENS` tokens share a pass.

        Args:
            batches: Gone through once.
            points: E.g. `partial(adapter.at_scale, 0.5)`, or a function that returns
                `adapter.perturbed(strength, generator)`; each is entered once a pass, so a random one
                makes its generator anew.

        Returns:
            One list a point, with one entry a batch.
        """
        return self._sweep(batches, points, "response", Passes.cross_entropy)

    @torch.no_grad()
    def sweep_row_kl(
        self,
        batches: Iterable[PackedBatch],
        points: Sequence[Point],
        kl_positions: CountedPositions = "response",
    ) -> list[list[RowLosses]]:
        """D_KL(reference || tuned) of each row in each state of the adapter; the reference runs once.

        Args:
            batches: Gone through once.
            points: As in `sweep_row_ce`.
            kl_positions: Where the KL counts.

        Returns:
            One list a point, with one entry a batch.
        """
        return self._sweep(batches, points, kl_positions, Passes.kl)

    def _sweep(
        self,
        batches: Iterable[PackedBatch],
        points: Sequence[Point],
        positions: CountedPositions,
        loss: Callable[[Passes, int, Tensor], Tensor],
    ) -> list[list[RowLosses]]:
        results: list[list[RowLosses]] = [[] for _ in points]
        batches = list(batches)
        together = bool(batches) and self._may_join(batches[0])
        for group in neighbours(batches, JOINED_TOKENS if together else 0):
            batch, sizes = joined(group), [each.num_rows for each in group]
            passes, mask = self._passes([batch]), batch.counted(positions)
            for point, result in zip(points, results, strict=True):
                with point():
                    rows = RowLosses.of_tokens(batch, mask, loss(passes, 0, mask))
                result.extend(rows.split(sizes))
        return results


def _waits_for_launches(batch: PackedBatch) -> bool:
    """Whether one pass over short batches saves more than it costs to compute some rows for nothing: on a GPU."""
    return batch.input_ids.is_cuda


def _constant(found: TokenSum) -> TokenSum:
    return TokenSum(found.total.detach(), found.count)
