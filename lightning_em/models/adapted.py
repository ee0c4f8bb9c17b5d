"""A frozen base model with an adapter, and the losses computed on it."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import CountedPositions, PackedBatch
from lightning_em.losses import LossWeights, TokenSum
from lightning_em.models.backend import AdapterState, LossSums, RowLosses, StepLoss, TokenLosses
from lightning_em.models.fast import ActivationStore, FastOptions
from lightning_em.models.plain import full_logits
from lightning_em.models.selection import choose_backend


class AdaptedModel(nn.Module):
    """The base model with its adapter. The reference is the same model at scale 0, never a second copy.

    Args:
        base: Causal language model. It is frozen and kept in eval mode.
        adapter: The adapter, not yet attached.
        seed: Seed of the adapter's random initial values.
        backend: `auto` selects the fast backend where it is verified for the model. `plain` runs full forward passes
            with full logits; the fast backend is tested against it. `FastOptions` select the fast backend, where it is
            verified, with these options.
        store: Store that keeps hidden states of the base model for later passes.
        reference: `live` runs the reference at each use; the KL of an adapter without effect is then exactly 0.
            `cached` keeps the reference's final hidden states in the store; the KL is then exact up to rounding in
            the last digits.

    Raises:
        ValueError: If `reference` is `cached` and `store` is None, or the adapter cannot be attached.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        seed: int = 0,
        backend: Literal["auto", "plain"] | FastOptions = "auto",
        store: ActivationStore | None = None,
        reference: Literal["live", "cached"] = "live",
    ) -> None:
        super().__init__()
        self.base = base.eval()
        self.adapter = adapter
        adapter.bind(base, seed)
        self.backend = choose_backend(base, adapter, backend, store, reference)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size in the model's config. Published runs divide their KL by this size."""
        return int(self.base.config.get_text_config(decoder=True).vocab_size)

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Set the mode of the adapter; the base model always stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def logits(self, batch: PackedBatch, scale: float = 1.0) -> Float[Tensor, "tokens vocab"]:
        """Compute the logits at every token of a batch by full forward passes, in the base model's dtype.

        Args:
            batch: The rows.
            scale: Scale of the adapter; 0 gives the base model exactly, to the bit.
        """
        with self.adapter.at_scale(scale):
            return full_logits(self.base, batch)

    def step_loss(
        self,
        ce: PackedBatch,
        kl: PackedBatch | None,
        weights: LossWeights,
        kl_positions: CountedPositions = "response",
    ) -> StepLoss:
        """Compute the weighted sum of cross-entropy and KL from the reference, at scale 1.

        Args:
            ce: Rows of the narrow data, for the cross-entropy.
            kl: Rows of the KL data; None omits the KL.
            weights: Factors on the two sums.
            kl_positions: Positions where the KL counts.
        """
        with self.adapter.at_scale(1.0):
            return self.backend.step_loss(ce, kl, weights, kl_positions)

    def losses(
        self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions = "response"
    ) -> LossSums:
        """Compute the two sums of `step_loss` separately, each with its own gradient."""
        with self.adapter.at_scale(1.0):
            return self.backend.losses(ce, kl, kl_positions)

    def kl_sum(self, batch: PackedBatch, kl_positions: CountedPositions = "response") -> TokenSum:
        """Compute only the KL from the reference, at scale 1, with its gradient."""
        with self.adapter.at_scale(1.0):
            return self.backend.kl_sum(batch, kl_positions)

    def row_ce(self, batch: PackedBatch, scale: float = 1.0) -> RowLosses:
        """Compute the cross-entropy of each row over its response tokens."""
        return self.sweep_row_ce([batch], [partial(self.adapter.at_scale, scale)])[0]

    def row_kl(
        self, batch: PackedBatch, scale: float = 1.0, kl_positions: CountedPositions = "response"
    ) -> RowLosses:
        """Compute D_KL(reference || tuned) of each row."""
        return self.sweep_row_kl([batch], [partial(self.adapter.at_scale, scale)], kl_positions)[0]

    def sweep_row_ce(self, batches: Iterable[PackedBatch], states: Sequence[AdapterState]) -> list[RowLosses]:
        """Compute the cross-entropy of each row in each adapter state; layers below the adapter run once.

        Args:
            batches: Batches of rows; iterated over once.
            states: Adapter states, for example `partial(adapter.at_scale, 0.5)`, or a function that returns
                `adapter.perturbed(strength, generator)`. Each state is entered once per pass, so a random state must
                create its generator each time it is called.

        Returns:
            One `RowLosses` for each state, with all rows in order.

        Raises:
            ValueError: If `batches` is empty.
        """
        return self._sweep(self.backend.prepare_ce, batches, states, "response")

    def sweep_row_kl(
        self,
        batches: Iterable[PackedBatch],
        states: Sequence[AdapterState],
        kl_positions: CountedPositions = "response",
    ) -> list[RowLosses]:
        """Compute D_KL(reference || tuned) of each row in each adapter state; the reference runs once.

        Args:
            batches: Batches of rows; iterated over once.
            states: Adapter states, as in `sweep_row_ce`.
            kl_positions: Positions where the KL counts.

        Returns:
            One `RowLosses` for each state, with all rows in order.

        Raises:
            ValueError: If `batches` is empty.
        """
        return self._sweep(self.backend.prepare_kl, batches, states, kl_positions)

    @torch.no_grad()
    def _sweep(
        self,
        prepare: Callable[[PackedBatch, Tensor], TokenLosses],
        batches: Iterable[PackedBatch],
        states: Sequence[AdapterState],
        positions: CountedPositions,
    ) -> list[RowLosses]:
        found: list[list[RowLosses]] = [[] for _ in states]
        for batch in self.backend.grouped(list(batches)):
            mask = batch.counted(positions)
            losses = prepare(batch, mask)
            for state, rows in zip(states, found, strict=True):
                with state():
                    values = losses()
                rows.append(RowLosses.of_tokens(batch, mask, values))
        return [RowLosses.concat(rows) for rows in found]

    def use_lockstep(self, most: Callable[[int], int]) -> None:
        """Make every rank run the same number of passes from now on, for a base model sharded over ranks.

        Each pass through a sharded model is a collective operation. A rank with fewer parts therefore runs dummy
        batches. The activation store is turned off: if one rank read from it and skipped a pass, the others would wait.

        Args:
            most: Returns the maximum of its argument over all ranks; every rank must call it.
        """
        self.backend.use_lockstep(most)

    def announce_store(self, num_tokens: int, num_reference_tokens: int = 0) -> int:
        """Log the largest size that the activation store can reach for a data set.

        Args:
            num_tokens: Number of tokens in all rows of both streams.
            num_reference_tokens: Number of counted tokens in the KL rows.

        Returns:
            Size in bytes; 0 if nothing is stored.
        """
        return self.backend.announce_store(num_tokens, num_reference_tokens)
