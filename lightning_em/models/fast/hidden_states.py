"""Hidden states of the tuned model and of the reference; layers below the adapter run once for both."""

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
from lightning_em.models.padding import right_padded

logger = logging.getLogger(__name__)


class HiddenStates:
    """Runs the two halves of a model on packed or padded rows.

    Hidden states have shape `[tokens hidden]`, with all rows concatenated, also if the model runs on padded rows.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter. Each pass uses its current scale and values.
        split: Whether to run the layers below the adapter once for all passes.
        packed: Whether to run the model on packed rows, which are concatenated without padding.
        store: Store that keeps hidden states for later passes.
        reference: `cached` also keeps the final hidden states of the reference in the store.

    Attributes:
        packed: Whether the model runs on packed rows; set to False if a layer does not use packed attention.
        cache: Cache of the rows in the store; None if nothing is stored.
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
        """Whether the reference is computed at each use."""
        return self.cache is None or not self.caches_reference

    def prefix(self, batch: PackedBatch) -> Float[Tensor, "tokens hidden"] | None:
        """Compute the hidden states that enter the adapter's lowest layer; they are the same at every scale.

        Returns:
            The states; None if no layer lies below the adapter, or the split is off.
        """
        if not self.has_prefix:
            return None
        # Inference mode is left even in validation and sweeps, for two reasons. Training may read these states from
        # the store, and autograd cannot save inference tensors for a backward pass. And inference tensors have no
        # version counter, which `SplitDecoder.final_hidden` uses to detect in-place writes.
        with torch.inference_mode(False), torch.no_grad():
            if self.cache is None:
                return self._prefix(batch)
            if not self.split.adapter_is_above:
                # The first pass checks that the adapter changes nothing below its `lowest_layer`. If the store already
                # holds every row, no pass would run, so run one here.
                self._prefix(batch.select([0]))
            packed = self.packs(batch)

            def compute(rows: Sequence[int]) -> Tensor:
                return self._prefix(batch.select(rows))

            return self.cache.states(f"entering {self.split.cut}", batch, packed, compute)

    def final(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """Compute the hidden states after the final norm at the masked tokens, in the adapter's current state.

        Args:
            batch: The rows.
            mask: True where a token counts.
            prefix: Result of `prefix` for the batch; None runs the whole decoder.
        """
        with self._layout(batch) as (inputs, real):
            shape = inputs["input_ids"].shape
            below = None if prefix is None else self._laid_out(prefix, shape, real)
            keep = mask.nonzero()[:, 0] if isinstance(real, slice) else real[mask]
            return self.split.final_hidden(inputs, keep, below)

    def reference(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """Compute `final` at scale 0 without a gradient, or read it from the store."""
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
        """Return whether the model runs on packed rows.

        The first call checks that every layer uses packed attention. transformers calls the attention function that
        the config names, but remote or patched code may call its own function, whose tokens would attend to other
        rows. Such a layer does not add itself to `Packing.attended`.
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
        """Log the largest size that the stored states can take; return it in bytes, 0 if nothing is stored."""
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
        """Yield the model's inputs, and the indices of real tokens in their flattened positions."""
        if self.packs(batch):
            with packed_attention(self.base):
                yield packed_inputs(batch), slice(None)
            return
        rows = batch.padded()
        yield right_padded(self.base, rows)._asdict(), rows.attention_mask.flatten().nonzero()[:, 0]

    def _laid_out(self, prefix: Tensor, shape: torch.Size, real: Tensor | slice) -> Tensor:
        """Arrange the states of the real tokens in the shape of the model's inputs, `[batch seq hidden]`."""
        if self.packed:
            return prefix[None]
        # Padding positions stay zero. With right padding, causal attention and the attention mask, no real token
        # attends to them.
        states = prefix.new_zeros((shape.numel(), prefix.shape[1]))
        states[real] = prefix
        return states.view(*shape, -1)
