"""Attention over rows laid end to end: each token sees its own row only, and no token is padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_em.batch import PackedBatch

PACKED = "lightning_em_packed"


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a language model inside `packed_attention`: one row that holds them all."""
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.positions()[None],
        "row_lengths": batch.lengths,
        "cu_seqlens": batch.cu_seqlens(),
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
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row_lengths: tuple[int, ...] = (),
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, as transformers calls an attention function.

    Args:
        module: The attention module; not looked at.
        query: `[1 heads tokens head_dim]`.
        key: `[1 key_heads tokens head_dim]`.
        value: As `key`.
        attention_mask: None; rows are told apart by `row_lengths`.
        scaling: Factor on the scores; one over the root of head_dim if not given.
        dropout: 0; the base is in eval mode.
        sliding_window: How many tokens back a token sees, itself included; all if not given.
        softcap: Bound on the scores, soft_cap * tanh(score / soft_cap).
        row_lengths: Tokens of each row.
        cu_seqlens: Where each row starts, for the varlen kernel.

    Returns:
        `[1 tokens heads head_dim]` and no weights.
    """
    assert attention_mask is None
    assert sum(row_lengths) == query.shape[2], "packed attention needs row_lengths"
    assert dropout == 0, "the frozen base is in eval mode"
    if _varlen_applies(query, softcap):
        assert cu_seqlens is not None
        return _varlen(query, key, value, scaling, sliding_window, row_lengths, cu_seqlens), None
    rows = zip(*(torch.split(t, list(row_lengths), dim=2) for t in (query, key, value)), strict=True)
    outputs = [_row(q, k, v, scaling, sliding_window, softcap).transpose(1, 2) for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _varlen_applies(query: Tensor, softcap: float | None) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    row_lengths: tuple[int, ...],
    cu_seqlens: Tensor,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(row_lengths)
    result = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, Tensor)
    return result[None]


def _row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    length, grouped = query.shape[2], query.shape[1] != key.shape[1]
    mask = None
    if softcap is not None or (sliding_window is not None and length > sliding_window):
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if sliding_window is not None:
            mask = mask.triu(1 - sliding_window)
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
