"""A frozen base and an adapter as one model, with the losses measured on it."""

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
    """The base with its adapter. The reference is this same model at scale 0, never a second copy.

    Args:
        base: A causal language model; frozen and kept in eval mode from here on.
        adapter: The adapter, not attached yet.
        seed: Seed of the adapter's random initial values.
        backend: `auto`: the fast backend where it is verified; `plain`: full forward passes and full logits,
            what the fast backend is tested against; or the fast backend with these options.
        store: Keeps hidden states of the base from one use to the next.
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
        """Vocabulary size in the model's config (what published KL weights were divided by)."""
        return int(self.base.config.get_text_config(decoder=True).vocab_size)

    def train(self, mode: bool = True) -> "AdaptedModel":
        """Switch the mode of the adapter; the base always stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def logits(self, batch: PackedBatch, scale: float = 1.0) -> Float[Tensor, "tokens vocab"]:
        """Logits at every token of the batch, in the base's own dtype, from one full forward pass.

        Args:
            batch: Rows laid end to end.
            scale: Scale of the adapter; 0 is the base to the bit.
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
        """Weighted sum of the cross-entropy on one batch and the KL from the reference on another, at scale 1.

        Args:
            ce: Rows of the narrow data.
            kl: Rows of the KL data; None leaves the KL out.
            weights: Factors on the two sums.
            kl_positions: Where the KL counts.
        """
        with self.adapter.at_scale(1.0):
            return self.backend.step_loss(ce, kl, weights, kl_positions)

    def losses(
        self, ce: PackedBatch, kl: PackedBatch | None, kl_positions: CountedPositions = "response"
    ) -> LossSums:
        """The two sums of `step_loss`, each with a gradient of its own."""
        with self.adapter.at_scale(1.0):
            return self.backend.losses(ce, kl, kl_positions)

    def kl_sum(self, batch: PackedBatch, kl_positions: CountedPositions = "response") -> TokenSum:
        """KL from the reference alone, at scale 1, with its gradient."""
        with self.adapter.at_scale(1.0):
            return self.backend.kl_sum(batch, kl_positions)

    def row_ce(self, batch: PackedBatch, scale: float = 1.0) -> RowLosses:
        """Cross-entropy of each row over its response tokens."""
        return self.sweep_row_ce([batch], [partial(self.adapter.at_scale, scale)])[0]

    def row_kl(
        self, batch: PackedBatch, scale: float = 1.0, kl_positions: CountedPositions = "response"
    ) -> RowLosses:
        """D_KL(reference || tuned) of each row."""
        return self.sweep_row_kl([batch], [partial(self.adapter.at_scale, scale)], kl_positions)[0]

    def sweep_row_ce(self, batches: Iterable[PackedBatch], states: Sequence[AdapterState]) -> list[RowLosses]:
        """Cross-entropy of each row in each state of the adapter; what lies below it runs once.

        Args:
            batches: The rows; iterated over once.
            states: For example `partial(adapter.at_scale, 0.5)`, or a function that returns
                `adapter.perturbed(strength, generator)`. Each is entered once a pass, so a random one
                makes its generator anew.

        Returns:
            The losses of all rows in order, once for each state.

        Raises:
            ValueError: If there is no batch.
        """
        return self._sweep(self.backend.prepare_ce, batches, states, "response")

    def sweep_row_kl(
        self,
        batches: Iterable[PackedBatch],
        states: Sequence[AdapterState],
        kl_positions: CountedPositions = "response",
    ) -> list[RowLosses]:
        """D_KL(reference || tuned) of each row in each state of the adapter; the reference runs once.

        Args:
            batches: The rows; iterated over once.
            states: As in `sweep_row_ce`.
            kl_positions: Where the KL counts.

        Returns:
            The losses of all rows in order, once for each state.

        Raises:
            ValueError: If there is no batch.
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

    def compute_in_step(self, most: Callable[[int], int]) -> None:
        """From now on make as many passes as the rank that needs the most: each gathers the base's weights.

        The activation store is off then: a pass that one rank is spared would keep the others waiting.

        Args:
            most: Returns the largest of all ranks' numbers; every rank has to call it.
        """
        self.backend.compute_in_step(most)

    def announce_store(self, num_tokens: int, num_reference_tokens: int = 0) -> int:
        """Log what the activation store will take for a data set at most, before it is filled.

        Args:
            num_tokens: Tokens of all rows of both streams.
            num_reference_tokens: Counted tokens of the KL rows.

        Returns:
            Bytes; 0 if nothing is stored.
        """
        return self.backend.announce_store(num_tokens, num_reference_tokens)
