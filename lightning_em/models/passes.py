"""Per-token and per-row losses of some batches in one or several states of the adapter."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch, joined
from lightning_em.losses import token_cross_entropy, token_kl
from lightning_em.models.engine import Engine


class Passes:
    """Per-token losses of some batches; whatever does not depend on the adapter is computed once.

    Args:
        engine: The fast path; None for the plain one.
        adapter: Its scale and values at each call are what is measured.
        plain_logits: All logits of a batch at a scale, for the plain path.
        batches: Which the calls refer to by number.
    """

    def __init__(
        self,
        engine: Engine | None,
        adapter: Adapter,
        plain_logits: Callable[[PackedBatch, float], Tensor],
        batches: Sequence[PackedBatch],
    ) -> None:
        self.engine, self.adapter, self.batches = engine, adapter, batches
        self._plain_logits = plain_logits
        self._references: dict[int, Tensor] = {}
        if engine is not None:
            self.head = engine.head()
            self.together = joined(batches)
            self.prefix = engine.prefix(self.together)
            sizes = [sum(batch.lengths) for batch in batches]
            self.prefixes: list[Tensor | None] = [None] * len(batches)
            if self.prefix is not None:
                self.prefixes = [*torch.split(self.prefix, sizes)]

    def cross_entropy(self, index: int, mask: Bool[Tensor, "tokens"]) -> Float[Tensor, "counted"]:
        """Cross-entropy at the masked tokens of one batch, with the adapter as it is."""
        targets = self.batches[index].targets()[mask]
        if self.engine is None:
            return token_cross_entropy(self._tuned(index, mask), targets)
        return self.engine.cross_entropy(self.head, self._tuned(index, mask), targets)

    def kl(self, index: int, mask: Bool[Tensor, "tokens"]) -> Float[Tensor, "counted"]:
        """KL from the reference at the masked tokens of one batch, the same mask every time."""
        if index not in self._references:
            self._references[index] = self._reference(index, mask)
        reference = self._references[index]
        if self.engine is None:
            return token_kl(reference, self._tuned(index, mask))
        return self.engine.kl(self.head, reference, self._tuned(index, mask))

    def both(
        self, ce_mask: Bool[Tensor, "ce_tokens"], kl_mask: Bool[Tensor, "kl_tokens"]
    ) -> tuple[Float[Tensor, "ce_counted"], Float[Tensor, "kl_counted"]]:
        """Cross-entropy of the first batch and KL of the second from one tuned pass over both; fast path only."""
        assert self.engine is not None
        targets = self.batches[0].targets()[ce_mask]
        if self.engine.reference_is_live:
            # of the tuned pass's shape: another rounds in its own way, and a KL of 0 would not be 0
            reference = self.engine.reference(
                self.together, torch.cat([torch.zeros_like(ce_mask), kl_mask]), self.prefix
            )
        else:
            reference = self._reference(1, kl_mask)
        hidden = self.engine.final_hidden(self.together, torch.cat([ce_mask, kl_mask]), self.prefix)
        of_ce, of_kl = torch.split(hidden, [int(ce_mask.sum()), int(kl_mask.sum())])
        values = self.engine.cross_entropy(self.head, of_ce, targets)
        return values, self.engine.kl(self.head, reference, of_kl)

    @torch.no_grad()
    def _reference(self, index: int, mask: Tensor) -> Tensor:
        batch = self.batches[index]
        if self.engine is None:
            return self._plain_logits(batch, 0.0)[mask]
        return self.engine.reference(batch, mask, self.prefixes[index])

    def _tuned(self, index: int, mask: Tensor) -> Tensor:
        """Logits (plain path) or final hidden states at the masked tokens."""
        batch = self.batches[index]
        if self.engine is None:
            return self._plain_logits(batch, self.adapter.scale)[mask]
        return self.engine.final_hidden(batch, mask, self.prefixes[index])
