"""The passes over a frozen base that losses need, each computed once and only where it counts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch, joined, neighbours, single_rows
from lightning_em.losses.frozen_head import FrozenHead, head_cross_entropy, head_kl
from lightning_em.losses.functional import token_cross_entropy, token_kl
from lightning_em.models.attention import PACKED, packed_attention, packed_inputs
from lightning_em.models.fingerprint import fingerprint, numerics, row_key
from lightning_em.models.split import SplitDecoder, frozen_head
from lightning_em.models.store import ActivationStore

logger = logging.getLogger(__name__)

PART_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Enough for a matrix product to be at full speed; more only costs memory."""


@dataclass(frozen=True)
class EngineOptions:
    """Parts of the fast path; all are on unless one is to be measured or doubted.

    Attributes:
        split: Run what lies below the adapter once, without autograd, for the tuned model and the reference.
        packed: Lay rows end to end instead of padding them.
        fused: Losses from hidden states in chunks, instead of from logits at the counted positions.
        immediate: Make the gradient of each part of a batch in the forward pass and forget its activations.
        part_tokens: Aim for the tokens of one part; chosen by device if not given.
    """

    split: bool = True
    packed: bool = True
    fused: bool = True
    immediate: bool = True
    part_tokens: int | None = None


class Engine:
    """Hidden states and losses of a supported model.

    States travel as `[tokens hidden]`, rows end to end, whatever layout the model runs in.

    Args:
        base: With the adapter attached.
        adapter: Its current scale and values are what the passes use.
        options: Parts of the fast path.
        store: Keeps hidden states from one use to the next.
        reference: `cached` keeps the reference's final hidden states in the store too.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        options: EngineOptions,
        store: ActivationStore | None = None,
        reference: Literal["live", "cached"] = "live",
    ) -> None:
        self.base, self.adapter, self.options = base, adapter, options
        self.store, self.cache_reference = store, reference == "cached"
        self.split = SplitDecoder(base, adapter)
        self._fingerprints: dict[tuple[object, ...], str] = {}
        self._packing_is_checked = False
        if store is not None and not self.has_prefix and not self.cache_reference:
            reason = "no layer lies below the adapter"
            logger.warning("nothing is kept in the activation store, the reference runs live: %s", reason)
            self.store = None

    @property
    def has_prefix(self) -> bool:
        """Whether anything lies below the adapter that is worth computing once."""
        return self.options.split and self.split.cut > 0

    @property
    def reference_is_live(self) -> bool:
        """Whether the reference runs each time."""
        return self.store is None or not self.cache_reference

    def head(self) -> FrozenHead:
        """The output head as it is now."""
        return frozen_head(self.base)

    def prefix(self, batch: PackedBatch) -> Float[Tensor, "tokens hidden"] | None:
        """What enters the adapter's layer, the same for every scale; None if nothing lies below it.

        With a store on a CPU each row is run alone, so that its states do not depend on the rows beside it, nor
        a run's numbers on what the store happens to hold: see `_fill_groups`.
        """
        if not self.has_prefix:
            return None
        # sweeps in inference mode share the states too, and only other tensors know when they are written to
        with torch.inference_mode(False), torch.no_grad():
            if self.store is None:
                return self._prefix(batch)
            ids = torch.split(batch.input_ids.cpu(), list(batch.lengths))
            if not self.split.adapter_is_above:
                # a full store must not hide an adapter that lies lower than it says
                self._prefix(batch.select([0]))
            kind, space = f"entering {self.split.cut}", self._fingerprint(batch)
            keys = [row_key(space, kind, own_ids) for own_ids in ids]
            return torch.cat(
                self._stored(keys, lambda group: self._prefix(batch.select(group)), batch.lengths)
            )

    def reference(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """`final_hidden` at scale 0, without gradient.

        Args:
            batch: Rows laid end to end.
            mask: True where a token counts.
            prefix: What `prefix` gave for the batch.
        """
        if self.reference_is_live:
            return self._reference(batch, mask, prefix)
        assert self.store is not None
        space, lengths = self._fingerprint(batch), list(batch.lengths)
        ids, cpu_masks = (torch.split(tensor.cpu(), lengths) for tensor in (batch.input_ids, mask))
        masks = torch.split(mask, lengths)
        prefixes = None if prefix is None else torch.split(prefix, lengths)

        def compute(group: Sequence[int]) -> Tensor:
            below = None if prefixes is None else torch.cat([prefixes[index] for index in group])
            return self._reference(batch.select(group), torch.cat([masks[index] for index in group]), below)

        keys = [
            row_key(space, "reference", own_ids, own_mask)
            for own_ids, own_mask in zip(ids, cpu_masks, strict=True)
        ]
        return torch.cat(self._stored(keys, compute, [int(own.sum()) for own in cpu_masks]))

    def parts(self, batch: PackedBatch) -> list[PackedBatch]:
        """Groups of neighbouring rows to be differentiated one after the other."""
        limit = self.options.part_tokens or PART_TOKENS["cuda" if batch.input_ids.is_cuda else "cpu"]
        if not self.options.immediate or sum(batch.lengths) <= limit:
            return [batch]
        return [joined(group) for group in neighbours(single_rows(batch), limit)]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one hidden state in the store."""
        return int(self.base.config.get_text_config(decoder=True).hidden_size) * self.base.dtype.itemsize

    def _prefix(self, batch: PackedBatch) -> Tensor:
        with self._layout(batch) as (inputs, real):
            return self.split.prefix(inputs).flatten(0, 1)[real]

    @torch.no_grad()
    def _reference(self, batch: PackedBatch, mask: Tensor, prefix: Tensor | None) -> Tensor:
        with self.adapter.at_scale(0.0):
            return self.final_hidden(batch, mask, prefix)

    def _stored(
        self, keys: Sequence[str], compute: Callable[[Sequence[int]], Tensor], lengths: Sequence[int]
    ) -> list[Tensor]:
        """States of each row of a batch, from the store or computed and put there.

        Args:
            keys: One a row.
            compute: States of the rows of these numbers, end to end.
            lengths: How many states each row has.
        """
        assert self.store is not None
        device = self.base.device
        places = {key: index for index, key in enumerate(keys)}  # a row may be there twice
        found = {key: states for key in places if (states := self.store.get(key, device)) is not None}
        for group in _fill_groups([index for key, index in places.items() if key not in found], device):
            parts = torch.split(compute(group), [lengths[index] for index in group])
            for index, states in zip(group, parts, strict=True):
                self.store.put(keys[index], states)
                found[keys[index]] = states
        return [found[key] for key in keys]

    def _fingerprint(self, batch: PackedBatch) -> str:
        # at every use: autocast may be on in one pass and off in the next
        facts = (self.packs(batch), *numerics(batch.input_ids.device))
        if facts not in self._fingerprints:
            layout = PACKED if self.options.packed else str(self.base.config._attn_implementation)
            self._fingerprints[facts] = fingerprint(self.base, self.adapter.trainable().values(), layout)
            logger.info("activation store: %d bytes a token", self.bytes_per_token)
        return self._fingerprints[facts]

    def final_hidden(
        self, batch: PackedBatch, mask: Bool[Tensor, "tokens"], prefix: Float[Tensor, "tokens hidden"] | None
    ) -> Float[Tensor, "counted hidden"]:
        """Hidden states after the final norm at the masked tokens, with the adapter as it is.

        Args:
            batch: Rows laid end to end.
            mask: True where a token counts.
            prefix: What `self.prefix` gave for the batch.
        """
        with self._layout(batch) as (inputs, real):
            shape = inputs["input_ids"].shape
            below = None if prefix is None else self._placed(prefix, shape, real)
            keep = mask.nonzero()[:, 0] if isinstance(real, slice) else real[mask]
            return self.split.final_hidden(inputs, keep, below)

    def cross_entropy(
        self, head: FrozenHead, hidden: Float[Tensor, "counted hidden"], targets: Int[Tensor, "counted"]
    ) -> Float[Tensor, "counted"]:
        """Cross-entropy of each counted token, nats."""
        if self.options.fused:
            return head_cross_entropy(head, hidden, targets)
        return token_cross_entropy(plain_logits(head, hidden), targets)

    def kl(
        self,
        head: FrozenHead,
        reference: Float[Tensor, "counted hidden"],
        hidden: Float[Tensor, "counted hidden"],
    ) -> Float[Tensor, "counted"]:
        """D_KL(reference || tuned) at each counted token, nats."""
        if self.options.fused:
            return head_kl(head, reference, hidden)
        return token_kl(plain_logits(head, reference), plain_logits(head, hidden))

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

    @torch.no_grad()
    def packs(self, batch: PackedBatch) -> bool:
        """Whether rows lie end to end; before they do for the first time, does every layer keep them apart?"""
        if self.options.packed and not self._packing_is_checked:
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
                self.options = replace(self.options, packed=False)
        return self.options.packed

    def _placed(self, prefix: Tensor, shape: torch.Size, real: Tensor | slice) -> Tensor:
        if self.options.packed:
            return prefix[None]
        states = prefix.new_zeros((shape.numel(), prefix.shape[1]))
        states[real] = prefix
        return states.view(*shape, -1)


def _fill_groups(missing: Sequence[int], device: torch.device) -> list[Sequence[int]]:
    """Rows that are computed together for the store.

    Alone, a row's states are the same to the bit whoever else was missing. A GPU would idle over it, and rounds by
    shape in any case: there a row is alone only where deterministic algorithms are asked for.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return [missing] if missing else []
    return [[index] for index in missing]


def plain_logits(head: FrozenHead, hidden: Float[Tensor, "counted hidden"]) -> Float[Tensor, "counted vocab"]:
    """Logits with their graph, in the head's own dtype, all at once."""
    logits = functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.soft_cap is None else (logits / head.soft_cap).tanh() * head.soft_cap
