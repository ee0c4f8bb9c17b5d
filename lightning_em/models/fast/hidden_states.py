"""Hidden states of the tuned model and of the reference, each layer run once and only where it is needed."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch
from lightning_em.models.fast.packing import packed_attention, packed_inputs
from lightning_em.models.fast.row_cache import RowCache
from lightning_em.models.fast.split import SplitDecoder
from lightning_em.models.fast.store import ActivationStore

logger = logging.getLogger(__name__)


class HiddenStates:
    """Runs the two halves of a model on packed or padded rows.

    States travel as `[tokens hidden]`, rows end to end, whatever layout the model runs in.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter; its current scale and values are what the passes use.
        split: Whether to run the layers below the adapter once for all passes.
        packed: Whether to lay rows end to end.
        store: Keeps hidden states from one use to the next.
        reference: `cached` keeps the reference's final hidden states in the store too.

    Attributes:
        packed: Whether rows lie end to end; turned off if a layer's attention cannot keep them apart.
        cache: Rows in the store; None if nothing is stored.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        split: bool,
        packed: bool,
        store: ActivationStore | None,
        reference: Literal["live", "cached"],
    ) -> None:
        self.base, self.adapter, self.packed = base, adapter, packed
        self.split = SplitDecoder(base, adapter)
        self.has_prefix = split and self.split.cut > 0
        self.caches_reference = reference == "cached"
        self.cache = None if store is None else RowCache(store, base, adapter)
        self._packing_is_checked = False
        if self.cache is not None and not self.has_prefix and not self.caches_reference:
            reason = "no layer lies below the adapter"
            logger.warning("nothing is kept in the activation store, the reference runs live: %s", reason)
            self.cache = None

    @property
    def reference_is_live(self) -> bool:
        """Whether the reference runs each time."""
        return self.cache is None or not self.caches_reference

    def prefix(self, batch: PackedBatch) -> Float[Tensor, "tokens hidden"] | None:
        """Hidden states that enter the adapter's lowest layer, the same at every scale; None if none lies below."""
        if not self.has_prefix:
            return None
        # Outside inference mode also when validation or a sweep asks: training may get these states from the store
        # and save them for a backward pass, and only ordinary tensors count writes in place, which `final` checks.
        with torch.inference_mode(False), torch.no_grad():
            if self.cache is None:
                return self._prefix(batch)
            if not self.split.adapter_is_above:
                # A full store must not hide that an adapter changes layers below its `lowest_layer`.
                self._prefix(batch.select([0]))
            packed = self.packs(batch)

            def compute(rows: Sequence[int]) -> Tensor:
                return self._prefix(batch.select(rows))

            return self.cache.states(f"entering {self.split.cut}", batch, packed, compute)

    def final(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """Hidden states after the final norm at the masked tokens, with the adapter as it is.

        Args:
            batch: Rows laid end to end.
            mask: True where a token counts.
            prefix: What `prefix` returned for the batch.
        """
        with self._layout(batch) as (inputs, real):
            shape = inputs["input_ids"].shape
            below = None if prefix is None else self._laid_out(prefix, shape, real)
            keep = mask.nonzero()[:, 0] if isinstance(real, slice) else real[mask]
            return self.split.final_hidden(inputs, keep, below)

    def reference(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """`final` at scale 0, without a gradient."""
        if self.cache is None or not self.caches_reference:
            return self._reference(batch, mask, prefix)
        masks = torch.split(mask, list(batch.lengths))
        prefixes = None if prefix is None else torch.split(prefix, list(batch.lengths))

        def compute(rows: Sequence[int]) -> Tensor:
            below = None if prefixes is None else torch.cat([prefixes[index] for index in rows])
            return self._reference(batch.select(rows), torch.cat([masks[index] for index in rows]), below)

        return self.cache.states("reference", batch, self.packs(batch), compute, mask)

    @torch.no_grad()
    def packs(self, batch: PackedBatch) -> bool:
        """Whether rows lie end to end; before they do for the first time, does every layer keep them apart?

        transformers calls the attention function that the config names, but remote or patched code may call one
        of its own, which would look across rows. Such a layer does not sign in with `Packing.attended`.
        """
        if self.packed and not self._packing_is_checked:
            row, layers = packed_inputs(batch.select([0])), len(self.split.layers)
            with packed_attention(self.base), self.adapter.at_scale(0.0):
                self.split.final_hidden(row)
            if len(row["packing"].attended) == layers:
                self._packing_is_checked = True
            else:
                logger.warning(
                    "padded rows instead of packed ones (slower): %d of %d layers compute attention by code of "
                    "their own, which would look across rows",
                    *(layers - len(row["packing"].attended), layers),
                )
                self.packed = False
        return self.packed

    def announce_store(self, num_tokens: int, num_reference_tokens: int) -> int:
        """Log what the store will take at most; returns the bytes, 0 if nothing is stored."""
        if self.cache is None:
            return 0
        tokens = self.has_prefix * num_tokens + self.caches_reference * num_reference_tokens
        self.cache.store.announce(tokens * self.cache.bytes_per_token, f"hidden states of {tokens} tokens")
        return tokens * self.cache.bytes_per_token

    def _prefix(self, batch: PackedBatch) -> Tensor:
        with self._layout(batch) as (inputs, real):
            return self.split.prefix(inputs).flatten(0, 1)[real]

    @torch.no_grad()
    def _reference(self, batch: PackedBatch, mask: Tensor, prefix: Tensor | None) -> Tensor:
        with self.adapter.at_scale(0.0):
            return self.final(batch, mask, prefix)

    @contextmanager
    def _layout(self, batch: PackedBatch) -> Iterator[tuple[dict[str, Any], Tensor | slice]]:
        """The model's inputs, and which of their flattened positions hold real tokens."""
        if self.packs(batch):
            with packed_attention(self.base):
                yield packed_inputs(batch), slice(None)
            return
        rows = batch.padded()
        inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        yield inputs, rows.attention_mask.flatten().nonzero()[:, 0]

    def _laid_out(self, prefix: Tensor, shape: torch.Size, real: Tensor | slice) -> Tensor:
        """States of the real tokens in the shape of the model's inputs, `[batch seq hidden]`."""
        if self.packed:
            return prefix[None]
        # Right padding, causal attention and the attention mask: no real token reads the zeros.
        states = prefix.new_zeros((shape.numel(), prefix.shape[1]))
        states[real] = prefix
        return states.view(*shape, -1)
