"""Tiny random models of every architecture the fast backend is listed for, named with their quirk."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lightning_em.batch import EncodedRow, PackedBatch
from tests.oracle import entirely_float64

LAYERS = 4
QUIRKS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2),
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 6, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    "gemma3": ("Gemma3", {"sliding_window": 5}),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "logits_scaling": 4.0,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "gpt_neox": ("GPTNeoX", {}),
}
OTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": (
        "Phimoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}
"""Architectures that the fast backend is not listed for, by the same fields."""


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Make the model with logits away from uniform, norms away from one and biases away from zero.

    A float64 model computes in float64 throughout, so that tolerances can follow from that dtype.
    """
    family, quirk = (QUIRKS | OTHER)[name]
    prefix = "Gemma3Text" if family == "Gemma3" else family
    fields: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.startswith("Gemma"):
        fields |= {"head_dim": 8, "query_pre_attn_scalar": 8}
        fields["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    config = getattr(transformers, f"{prefix}Config")(**(fields | quirk | overrides))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise) if "norm" in key else parameter.copy_(0.1 * noise)
    model = model.to(dtype).eval()
    return entirely_float64(model) if dtype == torch.float64 else model


def rows(lengths: tuple[int, ...], seed: int = 0, prompt: int = 3) -> PackedBatch:
    """Rows of random tokens; all but the first `prompt` tokens of each are response tokens."""
    generator = torch.Generator().manual_seed(seed)
    return PackedBatch.from_rows(
        [
            EncodedRow(
                torch.randint(3, 67, (length,), generator=generator).tolist(),
                [position >= prompt for position in range(length)],
                f"row-{seed}-{index}",
            )
            for index, length in enumerate(lengths)
        ]
    )
