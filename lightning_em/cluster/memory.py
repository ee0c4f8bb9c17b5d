"""Estimate the memory of a fit on one device from the model's config, without loading weights."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers
from lightning_em.models.fast import CONCAT_TOKENS, PART_TOKENS
from lightning_em.models.fast.fused_head import CHUNK_BYTES

_GIB = 2**30
_SAMPLE_TOKENS = 16  # few enough that terms quadratic in the length are negligible
_CHUNKS_ALIVE = 3.5  # logits of reference and tuned model, a softmax, and a copy in the head's dtype
_ADAM_COPIES = 4  # weight, gradient, two moments
_RESERVE = {"cuda": 1.5 * _GIB, "cpu": 0.5 * _GIB}
_SHARDS_GATHERED = 2  # the current block and the prefetched one


@dataclass(frozen=True)
class Load:
    """What has to be in memory at the same time.

    Attributes:
        part_tokens: Tokens of the largest part that is differentiated at once; 0 without a gradient.
        batch_tokens: Tokens in one pass below the adapter: both streams of a micro-batch.
        shards: Number of ranks that share the base model; 1 keeps it whole.
        device: `cuda` or `cpu`.
        store_bytes: Bytes of an activation store on the device.
        generated_tokens: Tokens whose keys and values are cached during generation.
    """

    part_tokens: int
    batch_tokens: int
    shards: int = 1
    device: str = "cuda"
    store_bytes: int = 0
    generated_tokens: int = 0

    @classmethod
    def of_rows(
        cls,
        narrow: list[int],
        kl: list[int],
        shards: int,
        device: str,
        store_bytes: int = 0,
        max_tokens: int | None = None,
    ) -> "Load":
        """Return the load of one micro-batch with these row lengths, or with enough such rows to fill `max_tokens`."""
        limit, longest = PART_TOKENS[device], max([*narrow, *kl])
        if max_tokens is not None:
            tokens = max(max_tokens, longest)
            largest = max(longest, min(limit, tokens))
        else:
            tokens = sum(narrow) + sum(kl)
            largest = max(longest, *(min(limit, sum(rows)) for rows in (narrow, kl)))
        if kl and shards == 1 and tokens <= CONCAT_TOKENS:
            largest = tokens  # both streams are differentiated in one pass
        return cls(largest, tokens, shards, device, store_bytes)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by purpose."""

    base: float
    adapter: float
    activations: float
    passes: float
    head: float
    caches: float
    reserve: float

    @property
    def total(self) -> float:
        """Total bytes."""
        return float(sum(vars(self).values()))

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {_gib(value)}" for name, value in vars(self).items() if value >= 0.005 * _GIB
        )
        return f"{_gib(self.total)} GiB ({parts})"


def on_meta(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """Build the model on the meta device: shapes and names, no weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    model.eval()
    return model


def estimate(base: PreTrainedModel, adapter: Adapter, *loads: Load) -> MemoryEstimate:
    """Estimate the peak memory of a fit on the fast backend.

    Args:
        base: Model from `on_meta`, with the adapter attached.
        adapter: Adapter attached to `base`.
        loads: Loads that occur one after the other.
    """
    graph = graph_bytes_per_token(base)
    return max((_at_once(base, adapter, load, graph) for load in loads), key=lambda found: found.total)


def _at_once(base: PreTrainedModel, adapter: Adapter, load: Load, graph: float) -> MemoryEstimate:
    own = {id(p) for p in adapter.trainable().values()}
    blocks = _num_bytes(p for p in decoder_layers(base).parameters() if id(p) not in own)
    rest = _num_bytes(p for p in base.parameters() if id(p) not in own) - blocks
    gathered = blocks / len(decoder_layers(base)) * _SHARDS_GATHERED if load.shards > 1 else 0
    config = base.config.get_text_config(decoder=True)
    wide = 4 * config.hidden_size + 3 * config.intermediate_size
    itemsize = base.dtype.itemsize
    logits = (load.part_tokens or load.batch_tokens) * config.vocab_size * 4
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys_and_values = 2 * config.num_hidden_layers * heads * head_dim * itemsize
    return MemoryEstimate(
        base=rest + blocks / load.shards + gathered,
        adapter=_ADAM_COPIES * _num_bytes(adapter.trainable().values()),
        activations=graph * load.part_tokens,
        passes=load.batch_tokens * (wide + config.hidden_size) * itemsize,
        head=_CHUNKS_ALIVE * min(logits, CHUNK_BYTES[load.device]),
        caches=load.store_bytes + load.generated_tokens * keys_and_values,
        reserve=_RESERVE[load.device],
    )


def graph_bytes_per_token(base: PreTrainedModel) -> float:
    """Return the bytes per token that autograd keeps for the backward pass, measured in a pass on the meta device.

    Below the adapter no tensor needs a gradient, so autograd keeps nothing there.

    Args:
        base: Model from `on_meta`, with the adapter attached.
    """
    weights = {_storage(p) for p in (*base.parameters(), *base.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in weights:
            kept.setdefault(_storage(tensor), tensor)
        return tensor

    ids = torch.zeros((1, _SAMPLE_TOKENS), dtype=torch.long, device="meta")
    # With a 4-D mask, transformers does not inspect the mask's values, which do not exist on the meta device.
    seen = torch.ones((1, 1, _SAMPLE_TOKENS, _SAMPLE_TOKENS), dtype=torch.bool, device="meta")
    nothing = torch.empty(0, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        base(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=nothing)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / _SAMPLE_TOKENS


def memory_there(device: str, gpu_gib: float | None = None) -> float | None:
    """Return the bytes that one process may use, or None if unknown.

    Args:
        device: `cuda` or `cpu`.
        gpu_gib: GiB of the GPU to assume; this machine's own by default.
    """
    if device == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if gpu_gib is not None:
        return gpu_gib * _GIB
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _num_bytes(parameters: Any) -> int:
    each: dict[int, nn.Parameter] = {id(p): p for p in parameters}  # count tied weights once
    return sum(p.numel() * p.element_size() for p in each.values())


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f}" if num_bytes < _GIB else f"{num_bytes / _GIB:.1f}"
