"""Attention over rows laid end to end: each token sees its own row only, and no token is padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_em.batch import PackedBatch

PACKED = "lightning_em_packed"


@dataclass(frozen=True)
class Packing:
    """How the rows of one forward pass lie, as every attention module of it is told.

    Attributes:
        lengths: Tokens of each row.
        cu_seqlens: Where each row starts, for the varlen kernel.
        attended: The modules, by `id`, that have asked for packed attention in this pass.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    attended: set[int] = field(default_factory=set)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None) -> Tensor:
        """True where a token of a row sees another; made once for all layers, and dropped with the pass."""
        if (length, window) not in self._masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.cu_seqlens.device).tril()
            self._masks[length, window] = seen if window is None else seen.triu(1 - window)
        return self._masks[length, window]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a language model inside `packed_attention`: one row that holds them all."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.positions[None],
        "packing": Packing(batch.lengths, batch.cu_seqlens),
    }


@contextmanager
def packed_attention(base: PreTrainedModel) -> Iterator[None]:
    """Let the model use packed attention inside the block; its own choice returns afterwards."""
    config = base.config
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, as transformers calls an attention function.

    Args:
        module: The attention module.
        query: `[1 heads tokens head_dim]`.
        key: `[1 key_heads tokens head_dim]`.
        value: As `key`.
        attention_mask: None; rows are told apart by `packing`.
        scaling: Factor on the scores; one over the root of head_dim if not given.
        dropout: 0; the base is in eval mode.
        sliding_window: How many tokens back a token sees, itself included; all if not given.
        softcap: Bound on the scores, soft_cap * tanh(score / soft_cap).
        packing: The rows, from `packed_inputs`.

    Returns:
        `[1 tokens heads head_dim]` and no weights.
    """
    assert attention_mask is None
    assert packing is not None, "packed attention needs packed_inputs"
    assert sum(packing.lengths) == query.shape[2], "row lengths do not cover the tokens"
    assert dropout == 0, "the frozen base is in eval mode"
    packing.attended.add(id(module))
    if _varlen_applies(query.device, query.dtype, softcap):
        return _varlen(query, key, value, scaling, sliding_window, packing), None
    # Neighbours of one length share a call: rows can be short. Split, not sliced: the gradient of a slice is as
    # large as the whole.
    runs = [(length, len(list(alike))) for length, alike in groupby(packing.lengths)]
    parts = (torch.split(t, [length * count for length, count in runs], dim=2) for t in (query, key, value))
    outputs = []
    for (_, count), *states in zip(runs, *parts, strict=True):
        q, k, v = (_stacked(t, count) for t in states)
        attended = _rows(q, k, v, scaling, sliding_window, softcap, packing)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _stacked(states: Tensor, count: int) -> Tensor:
    """`[1 heads tokens head_dim]` as `[count heads tokens/count head_dim]`."""
    if count == 1:
        return states
    _, heads, _, head_dim = states.shape
    return states.reshape(heads, count, -1, head_dim).transpose(0, 1)


def _varlen_applies(device: torch.device, dtype: torch.dtype, softcap: float | None) -> bool:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or softcap is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)  # flash attention's kernels begin at Ampere


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    packing: Packing,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packing.lengths)
    result = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.cu_seqlens,
        packing.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, Tensor)
    return result[None]


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    packing: Packing,
) -> Tensor:
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if softcap is not None or (sliding_window is not None and length > sliding_window):
        mask = packing.mask(length, sliding_window)
    if mask is None or softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = ((scores / softcap).tanh() * softcap).masked_fill(~mask, float("-inf"))
    # float32 as in transformers' own, also for a float64 model
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(PACKED, attend)
