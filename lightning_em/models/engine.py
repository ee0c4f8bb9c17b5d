"""The passes over a frozen base that losses need, each computed once and only where it counts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch
from lightning_em.losses.frozen_head import FrozenHead, head_cross_entropy, head_kl
from lightning_em.losses.functional import token_cross_entropy, token_kl
from lightning_em.models.attention import PACKED, packed_attention, packed_inputs
from lightning_em.models.fingerprint import fingerprint, row_key
from lightning_em.models.split import FAST_ARCHITECTURES, SplitDecoder, frozen_head
from lightning_em.models.store import ActivationStore, why_not_stored

logger = logging.getLogger(__name__)

# Enough for a matrix product to be at full speed; more only costs memory.
_CPU_PART_TOKENS, _CUDA_PART_TOKENS = 1024, 16384


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


def why_plain(base: PreTrainedModel) -> str | None:
    """Why the fast path does not apply to a model; None if it does."""
    config = base.config
    if config.model_type not in FAST_ARCHITECTURES:
        return f"model type {config.model_type} is not on the verified list"
    if getattr(config, "use_bidirectional_attention", False):
        return "the model's attention is bidirectional"
    try:
        frozen_head(base)
    except ValueError as error:
        return str(error)
    return None


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
        self._fingerprints: dict[torch.device, str] = {}
        reason = None if store is None else self._why_not_stored()
        if reason is not None:
            logger.warning("nothing is kept in the activation store, the reference runs live: %s", reason)
            self.store = None

    def _why_not_stored(self) -> str | None:
        if not self.has_prefix and not self.cache_reference:
            return "no layer lies below the adapter"
        return why_not_stored(self.base)

    @property
    def has_prefix(self) -> bool:
        """Whether anything lies below the adapter that is worth computing once."""
        return self.options.split and self.split.cut > 0

    def head(self) -> FrozenHead:
        """The output head as it is now."""
        return frozen_head(self.base)

    def prefix(self, batch: PackedBatch) -> Float[Tensor, "tokens hidden"] | None:
        """What enters the adapter's layer, the same for every scale; None if nothing lies below it.

        With a store each row is run alone, so that its states do not depend on the rows beside it, nor a
        run's numbers on what the store happens to hold.
        """
        if not self.has_prefix:
            return None
        if self.store is None:
            return self._prefix(batch)
        space = f"{self._fingerprint(batch)}/entering {self.split.cut}"
        rows = single_rows(batch)
        if not self.split.adapter_is_above:
            self._prefix(rows[0])  # a full store must not hide an adapter that lies lower than it says
        return torch.cat(
            [self._stored(row_key(space, row.input_ids), partial(self._prefix, row)) for row in rows]
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
        if self.store is None or not self.cache_reference:
            return self._reference(batch, mask, prefix)
        space = f"{self._fingerprint(batch)}/reference"
        lengths = list(batch.lengths)
        prefixes: Sequence[Tensor | None] = (
            [None] * len(lengths) if prefix is None else torch.split(prefix, lengths)
        )
        rows = zip(single_rows(batch), torch.split(mask, lengths), prefixes, strict=True)
        return torch.cat(
            [
                self._stored(
                    row_key(space, row.input_ids, own_mask),
                    partial(self._reference, row, own_mask, own_prefix),
                )
                for row, own_mask, own_prefix in rows
            ]
        )

    def parts(self, batch: PackedBatch) -> list[PackedBatch]:
        """Groups of neighbouring rows to be differentiated one after the other."""
        default = _CUDA_PART_TOKENS if batch.input_ids.is_cuda else _CPU_PART_TOKENS
        limit = self.options.part_tokens or default
        if not self.options.immediate or sum(batch.lengths) <= limit:
            return [batch]
        groups: list[list[PackedBatch]] = []
        filled = limit
        for row in single_rows(batch):
            if filled + row.lengths[0] > limit:
                groups.append([])
                filled = 0
            groups[-1].append(row)
            filled += row.lengths[0]
        return [joined(group) for group in groups]

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

    def _stored(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        assert self.store is not None
        states = self.store.get(key, self.base.device)
        if states is None:
            states = compute()
            self.store.put(key, states)
        return states

    def _fingerprint(self, batch: PackedBatch) -> str:
        device = batch.input_ids.device
        if device not in self._fingerprints:
            layout = PACKED if self.options.packed else str(self.base.config._attn_implementation)
            self._fingerprints[device] = fingerprint(self.base, self.adapter.trainable().values(), layout)
            logger.info("activation store: %d bytes a token", self.bytes_per_token)
        return self._fingerprints[device]

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
        if self.options.packed:
            with packed_attention(self.base):
                yield packed_inputs(batch), slice(None)
            return
        rows = batch.padded()
        inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
        yield inputs, rows.attention_mask.flatten().nonzero()[:, 0]

    def _placed(self, prefix: Tensor, shape: torch.Size, real: Tensor | slice) -> Tensor:
        if self.options.packed:
            return prefix[None]
        states = prefix.new_zeros((shape.numel(), prefix.shape[1]))
        states[real] = prefix
        return states.view(*shape, -1)


def plain_logits(head: FrozenHead, hidden: Float[Tensor, "counted hidden"]) -> Float[Tensor, "counted vocab"]:
    """Logits with their graph, in the head's own dtype, all at once."""
    logits = functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.soft_cap is None else (logits / head.soft_cap).tanh() * head.soft_cap


def single_rows(batch: PackedBatch) -> list[PackedBatch]:
    """Each row of a batch as a batch of its own."""
    parts = zip(
        torch.split(batch.input_ids, list(batch.lengths)),
        torch.split(batch.response_mask, list(batch.lengths)),
        batch.lengths,
        batch.row_ids,
        strict=True,
    )
    return [
        PackedBatch(ids, mask, (length,), (row_id,), batch.is_ghost) for ids, mask, length, row_id in parts
    ]


def joined(batches: Sequence[PackedBatch]) -> PackedBatch:
    """All rows of several batches as one."""
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        response_mask=torch.cat([batch.response_mask for batch in batches]),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        row_ids=tuple(row_id for batch in batches for row_id in batch.row_ids),
        is_ghost=all(batch.is_ghost for batch in batches),
    )
