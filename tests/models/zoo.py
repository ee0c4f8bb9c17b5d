"""A tiny random model of every causal language model class of transformers that can be built without other packages."""

import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 67
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "d_inner": 48,
    "ffn_hidden_size": 48, "dff": 48,
    "num_hidden_layers": 4, "n_layers": 4, "n_layer": 4, "decoder_layers": 4, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "kv_n_heads": 2, "head_dim": 8, "d_head": 8, "attention_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "max_source_positions": 128,
    "max_target_positions": 128, "sliding_window": 8, "attention_window_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "moe_topk": 2, "top_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_headdim": 8, "mamba_ngroups": 1,
    "n_mamba_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_dt_rank": 4,
    "state_size": 8, "conv_kernel": 4, "expand": 2, "num_heads": 8, "n_groups": 1, "chunk_size": 8,
    "time_step_rank": 4, "ssm_state_size": 8, "attention_hidden_size": 32, "lru_width": 32, "block_size": 8,
}  # fmt: skip
"""Fields by every name that a config of transformers gives them; each config takes those it has."""

_MLA = {"num_key_value_heads": 4, "head_dim": None}
_SPARSE = _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
}  # fmt: skip
_TEXT = {
    name: COMMON[name]
    for name in (
        *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        "max_position_embeddings",
    )
}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
}  # fmt: skip
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_GEMMA4 = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 0,
    "layer_types": _WINDOWS, "global_head_dim": 8,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v2": _MLA | {"q_lora_rank": None}, "deepseek_v3": _MLA,
    "deepseek_v32": _SPARSE, "glm4_moe_lite": _MLA, "glm_moe_dsa": _SPARSE, "minicpm3": _MLA, "youtu": _MLA,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 8},
    "cpmant": {
        "dim_head": 8, "dim_ff": 48, "max_distance": 128, "prompt_length": 4, "segment_types": 4,
    },
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE,
        "layer_types": _WINDOWS, "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _GEMMA4,
    "gemma4": {
        "text_config": _TEXT | _GEMMA4 | {"sliding_window": 8}, "vision_config": _VISION, "audio_config": None,
    },
    "qwen3_5": {"text_config": _TEXT | _LINEAR, "vision_config": _QWEN_VISION},
    "qwen3_5_moe": {"text_config": _TEXT | _LINEAR | _EXPERTS, "vision_config": _QWEN_VISION},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": {"layer_types": _HYBRID} | _LINEAR,
    "mllama": {
        "text_config": _TEXT
        | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
    },
    "llama4": {
        "text_config": _TEXT
        | {
            "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8,
        },
        "vision_config": _VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llama4_text": {"attention_chunk_size": 8, "no_rope_layers": [1, 1, 1, 0]},
    "emu3": {
        "text_config": _TEXT,
        "vocabulary_map": {"<image>": 3},
        "vq_config": {
            "codebook_size": 16, "embed_dim": 4, "base_channels": 4, "channel_multiplier": [1], "num_res_blocks": 1,
            "attn_resolutions": [2], "hidden_size": 8, "num_attention_heads": 1,
        },
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "bailing_hybrid": _MLA | {"layer_types": _HYBRID, "layer_group_size": 2},
    "kimi_linear": _MLA
    | {
        "linear_attn_config": {
            "full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 4,
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "zamba": {
        "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64,
        "attention_head_dim": 16, "head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "layer_types": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4, "n_mamba_heads": 8, "num_mem_blocks": 1, "use_shared_attention_adapter": False,
        "head_dim": None, "attention_head_dim": None, "attention_hidden_size": None,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB_SIZE, "shape_vocab_size": VOCAB_SIZE, "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
"""Fields by model type; None leaves out a common one."""


def build(kind: str, **overrides: Any) -> PreTrainedModel:
    """Make the model in float32, with weights that keep logits away from uniform and biases away from zero."""
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    for parent in config_class.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    known |= set(getattr(config_class, "attribute_map", {}))
    own = OWN.get(kind, {}) | overrides
    fields = {name: value for name, value in COMMON.items() if name in known and name not in own}
    fields |= {name: value for name, value in own.items() if value is not None or name not in COMMON}
    config = config_class(**fields)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 3e6, f"{kind} has {size} parameters: name its sizes in OWN"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.float().eval()
