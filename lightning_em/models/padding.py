"""Forward passes over padded rows that give each row the numbers it has alone.

In most models, padding changes nothing: causal attention and the attention mask hide it. The exceptions:

- Two rotary embeddings of transformers (5.23, `dynamic_rope_update`) choose their frequencies by the largest position
  in the whole input.
- Eager attention in float64 has NaN at padding that sees only padding.
- Sparse attention may select padding.
- With padding on the left, recurrent states and absolute positions may begin with the padding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.batch import PackedBatch, PaddedRows

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Types of rotary embedding whose frequencies depend on the longest row of a batch."""

UNPADDED_ARCHITECTURES = ("deepseek_v32", "glm_moe_dsa")
"""Model types whose sparse attention lets padding after a row change its logits, also behind a mask."""

BATCHED_ARCHITECTURES = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "bert",
    "bert-generation", "biogpt", "bitnet", "bloom", "camembert", "codegen", "cohere", "cohere2", "cohere2_moe",
    "ctrl", "cwm", "data2vec-text", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "electra",
    "emu3", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text",
    "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo",
    "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hy_v4", "hyperclovax", "inkling2_text", "inkling_text", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe",
    "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4", "llama4_text", "mamba",
    "mamba2", "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder", "moshi", "mpt", "nanochat",
    "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "persimmon",
    "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_moe", "qwen3_next", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    "youtu", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Model types for which tests show that prompts padded on the left have the answers that they have alone."""


class _Rotary(NamedTuple):
    """A rotary embedding whose frequencies depend on the length of the input.

    Attributes:
        module: The module.
        kind: One of `LENGTH_DEPENDENT`.
        limit: Longest input with the frequencies of short inputs.
        prefix: Prefix of the module's attributes, for an embedding that differs between types of layers.
    """

    module: nn.Module
    kind: str
    limit: int
    prefix: str

    def key(self, length: int) -> int:
        """Return a number that is equal for lengths with the same frequencies."""
        # longrope has two sets of frequencies; dynamic has one for each length beyond the limit
        return int(length > self.limit) if self.kind == "longrope" else max(length, self.limit)

    def reset(self) -> None:
        """Restore the state of a new module: `dynamic` keeps the frequencies of the longest input so far."""
        if self.kind != "dynamic":
            return
        module: Any = self.module
        original = getattr(module, f"{self.prefix}original_inv_freq")
        setattr(module, f"{self.prefix}inv_freq", original.clone())
        setattr(module, f"{self.prefix}max_seq_len_cached", module.original_max_seq_len)


_rotary: "WeakKeyDictionary[PreTrainedModel, list[_Rotary]]" = WeakKeyDictionary()


def run_padded(base: PreTrainedModel, batch: PackedBatch, run: Callable[[PaddedRows], Tensor]) -> Tensor:
    """Run a function on padded rows, in as few passes as give each row the numbers that it has alone.

    Args:
        base: The base model with the adapter attached.
        batch: The rows.
        run: Maps padded rows to a tensor `[batch seq ...]` by a forward pass of `base`.

    Returns:
        The values at the real tokens, `[tokens ...]`, in the order of the batch.
    """
    groups = list(_alike(base, batch.lengths))
    parts: dict[int, Tensor] = {}
    for group in groups:
        rows = (batch if len(groups) == 1 else batch.select(group)).padded()
        reset_length_dependent(base)
        values = run(right_padded(base, rows))[rows.attention_mask.bool()]
        if len(groups) == 1:
            return values
        parts |= zip(group, torch.split(values, [batch.lengths[row] for row in group]), strict=True)
    return torch.cat([parts[row] for row in range(batch.num_rows)])


def length_dependent(base: PreTrainedModel) -> list[_Rotary]:
    """Return the rotary embeddings of a model whose frequencies depend on the length of the input."""
    if base not in _rotary:
        _rotary[base] = [each for module in base.modules() for each in _rotary_of(module)]
    return _rotary[base]


def reset_length_dependent(base: PreTrainedModel) -> None:
    """Let rotary embeddings that depend on the length of the input forget earlier inputs."""
    for each in length_dependent(base):
        each.reset()


def why_one_by_one(base: PreTrainedModel, longest: int) -> str | None:
    """Return the reason why prompts padded on the left would get other answers than alone; None if they would not.

    Args:
        base: The base model.
        longest: Tokens of the longest prompt with its answer.
    """
    kind = base.config.model_type
    # a model sharded by FSDP2 has a class that torch derives from its own
    code = next(each.__module__ for each in type(base).__mro__ if not each.__module__.startswith("torch."))
    if kind not in BATCHED_ARCHITECTURES or not code.startswith("transformers.models."):
        return f"model type {kind} is not on the list of those whose answers in a batch are verified"
    if padding_makes_nan(base):
        return "in float64, padding makes eager attention NaN"
    for each in length_dependent(base):
        if longest > each.limit:
            return f"its rotary embedding ({each.kind}) depends on the longest row of a batch"
    return None


def _alike(base: PreTrainedModel, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield groups of rows that have the numbers in one padded pass that they have alone."""
    rotary = length_dependent(base)
    apart = base.config.model_type in UNPADDED_ARCHITECTURES
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        key = (length,) if apart else tuple(each.key(length) for each in rotary)
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def right_padded(base: PreTrainedModel, rows: PaddedRows) -> PaddedRows:
    """Return rows padded on the right with the attention mask that the model is given.

    Where masked padding is NaN, it is not masked: causal attention hides what follows a row.
    """
    return (
        rows._replace(attention_mask=torch.ones_like(rows.attention_mask))
        if padding_makes_nan(base)
        else rows
    )


def padding_makes_nan(base: PreTrainedModel) -> bool:
    """Tell whether the model has NaN at padding that sees nothing but padding, from where it spreads to other tokens.

    transformers 5.23 masks eager attention with the lowest number of its dtype and takes the softmax in float32, where
    the lowest float64 is -inf. Padding before a prompt sees only padding, and so does padding after a row that is
    longer than a sliding window.
    """
    return base.dtype == torch.float64 and base.config._attn_implementation == "eager"


def _rotary_of(module: nn.Module) -> Iterator[_Rotary]:
    kinds = getattr(module, "rope_type", None)
    settings = getattr(getattr(module, "config", None), "rope_parameters", None)
    by_layer_type = kinds if isinstance(kinds, dict) else {None: kinds}
    for layer_type, kind in by_layer_type.items():
        own = settings[layer_type] if settings and layer_type else settings
        if not isinstance(kind, str) or not own:
            continue
        prefix = f"{layer_type}_" if layer_type else ""
        if "dynamic" in kind:
            yield _Rotary(module, "dynamic", int(module.original_max_seq_len), prefix)  # type: ignore[arg-type]
        # Phimoe scales by the side of the limit whatever the type
        elif kind == "longrope" or "long_mscale" in own:
            yield _Rotary(module, "longrope", int(own["original_max_position_embeddings"]), prefix)
