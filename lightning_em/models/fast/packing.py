"""Attention over packed rows, which are concatenated without padding; each token attends only to its own row.

transformers 5.23 looks up the attention function by name in `ALL_ATTENTION_FUNCTIONS` and passes it the keyword
arguments of the model's forward pass. A function registered under a new name therefore receives the row lengths, and
no model code has to change. transformers builds no attention mask for an unknown name; `attend` builds the mask if it
needs one.
"""

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
    """Layout of the rows in one forward pass, passed to each of its attention modules.

    Attributes:
        lengths: Tokens of each row.
        cu_seqlens: Start of each row and end of the last, for the varlen kernel.
        attended: `id` of each module that has called packed attention in this pass.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    attended: set[int] = field(default_factory=set)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None) -> Tensor:
        """Return the attention mask of one row, True where a query (row) may attend to a key (column).

        The mask is built once for all layers, and freed together with the inputs of the pass.

        Args:
            length: Tokens of the row.
            window: Number of tokens that a token may attend to, itself included; all earlier ones if None.
        """
        if (length, window) not in self._masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.cu_seqlens.device).tril()
            self._masks[length, window] = seen if window is None else seen.triu(1 - window)
        return self._masks[length, window]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return the keyword arguments of a language model for use inside `packed_attention`.

    The model sees a batch of one row that contains all rows.
    """
    return {
        "input_ids": batch.input_ids[None],
        # positions restart at 0 in each row, so that a row's rotary embedding does not depend on earlier rows
        "position_ids": batch.positions[None],
        "packing": Packing(batch.lengths, batch.cu_seqlens),
    }


@contextmanager
def packed_attention(base: PreTrainedModel) -> Iterator[None]:
    """Switch the model to packed attention inside the block, and restore its own attention afterwards."""
    # Every attention module reads this private attribute at each call (transformers 5.23). The public setter is meant
    # for a permanent change and iterates over all submodels each time.
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
    """Compute causal attention within each row; the signature is that of transformers' attention functions.

    Args:
        module: The attention module.
        query: `[1 heads tokens head_dim]`.
        key: `[1 key_heads tokens head_dim]`.
        value: Same shape as `key`.
        attention_mask: Must be None; `packing` separates the rows.
        scaling: Factor on the scores; 1 / sqrt(head_dim) if not given.
        dropout: Must be 0; the base model is in eval mode.
        sliding_window: Number of tokens that a token attends to, itself included; all earlier tokens if not given.
        softcap: Bound on the scores: softcap * tanh(score / softcap).
        packing: Layout of the rows, from `packed_inputs`.

    Returns:
        Attention output `[1 tokens heads head_dim]`, and None in place of attention weights.
    """
    assert attention_mask is None
    assert packing is not None, "packed attention needs packed_inputs"
    assert sum(packing.lengths) == query.shape[2], "row lengths do not cover the tokens"
    assert dropout == 0, "the frozen base is in eval mode"
    # `HiddenStates.packs` compares this with the number of layers, to find layers that use other attention code.
    packing.attended.add(id(module))
    if _varlen_applies(query.device, query.dtype, softcap):
        return _varlen(query, key, value, scaling, sliding_window, packing), None
    # Without the varlen kernel, each row needs its own attention call. Adjacent rows of equal length share a call as a
    # batch, because rows can be short and each call has a fixed cost. torch.split instead of slicing: the backward pass
    # of a slice allocates a gradient as large as the whole tensor.
    runs = [(length, len(list(alike))) for length, alike in groupby(packing.lengths)]
    parts = (torch.split(t, [length * count for length, count in runs], dim=2) for t in (query, key, value))
    outputs = []
    for (_, count), *states in zip(runs, *parts, strict=True):
        q, k, v = (_stacked(t, count) for t in states)
        attended = _rows(q, k, v, scaling, sliding_window, softcap, packing)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _stacked(states: Tensor, count: int) -> Tensor:
    """Reshape `count` packed rows, `[1 heads tokens head_dim]`, to `[count heads tokens/count head_dim]`."""
    if count == 1:
        return states
    _, heads, _, head_dim = states.shape
    return states.reshape(heads, count, -1, head_dim).transpose(0, 1)


def _varlen_applies(device: torch.device, dtype: torch.dtype, softcap: float | None) -> bool:
    # The varlen kernel has no soft cap and supports only half precision.
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or softcap is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)  # flash attention needs Ampere or newer


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    packing: Packing,
) -> Tensor:
    # imported here because only GPU runs need it
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
        # (left, right) in tokens: -1 means no limit, and 0 on the right makes the attention causal
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
    # No mask where `is_causal` is enough: SDPA has faster kernels without an explicit mask.
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
    # SDPA has no soft cap. This repeats the eager attention of Gemma2 in transformers, including the float32 softmax,
    # which it also uses for float64 models.
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(PACKED, attend)
