"""Attention over rows laid end to end: each token sees its own row only, and no token is padding.

transformers looks its attention function up by name in `ALL_ATTENTION_FUNCTIONS` (5.23), and passes the keyword
arguments of the model's forward on to it. So a function under a name of our own gets the row lengths without a change
to any model. For a name it does not know, transformers builds no mask: `attend` makes what it needs.
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
        cu_seqlens: Where each row starts, for the varlen kernel.
        attended: Modules, by `id`, that have called packed attention in this pass.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    attended: set[int] = field(default_factory=set)
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, length: int, window: int | None) -> Tensor:
        """True where a token of a row sees another; made once for all layers and freed with the pass."""
        if (length, window) not in self._masks:
            seen = torch.ones(length, length, dtype=torch.bool, device=self.cu_seqlens.device).tril()
            self._masks[length, window] = seen if window is None else seen.triu(1 - window)
        return self._masks[length, window]


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments of a language model inside `packed_attention`: one row that holds all of them."""
    return {
        "input_ids": batch.input_ids[None],
        # start again at 0 in each row: the rotary embedding of a row must not depend on those before it
        "position_ids": batch.positions[None],
        "packing": Packing(batch.lengths, batch.cu_seqlens),
    }


@contextmanager
def packed_attention(base: PreTrainedModel) -> Iterator[None]:
    """Let the model use packed attention inside the block and restore its own choice afterwards."""
    # Every attention module reads this private attribute at each call (transformers 5.23); the public setter is meant
    # for a lasting choice, and looks through all submodels each time.
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
        attention_mask: None; `packing` separates the rows.
        scaling: Factor on the scores; 1 / sqrt(head_dim) if not given.
        dropout: 0; the base is in eval mode.
        sliding_window: How many tokens a token sees, itself included; all before it if not given.
        softcap: Bound on the scores, soft_cap * tanh(score / soft_cap).
        packing: Layout of the rows, from `packed_inputs`.

    Returns:
        `[1 tokens heads head_dim]`, and None instead of attention weights.
    """
    assert attention_mask is None
    assert packing is not None, "packed attention needs packed_inputs"
    assert sum(packing.lengths) == query.shape[2], "row lengths do not cover the tokens"
    assert dropout == 0, "the frozen base is in eval mode"
    packing.attended.add(id(module))
    if _varlen_applies(query.device, query.dtype, softcap):
        return _varlen(query, key, value, scaling, sliding_window, packing), None
    # Without the varlen kernel each row is a call of its own. Adjacent rows of one length share one, as a batch: rows
    # can be short, and a call has a fixed cost. Split, not sliced: the gradient of a slice is as large as the whole.
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
    # it has no soft cap, and float32 and float64 models keep their precision
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
    # imported here: needed on a GPU only
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
        # tokens to the left and to the right; -1 is no limit, and 0 to the right makes it causal
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
    # No mask where `is_causal` says it all: SDPA has faster kernels without one.
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
    # SDPA has no soft cap, so this is transformers' eager attention of Gemma2, with its float32 softmax also for a
    # float64 model.
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(PACKED, attend)
