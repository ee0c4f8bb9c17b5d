"""Tiny inputs that are real in every part: Hugging Face folders and chat JSONL files, made in milliseconds.

Every weight comes from a seeded generator with scales that keep the logits away from uniform, norms away
from one and biases away from zero, so that a term which is dropped by mistake changes a number.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3", "phi3")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PAD_TOKEN, BOS_TOKEN, TURN_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"
# In the byte-level alphabet a space is written as U+0120.
MERGES = (
    "_ t|h e|_ a|i n|o u|_t he|r e|o n|e r|_ s|_ w|a t|e n|o r|_ b|i s|_ f|e s|_ m|a n|l l|in g|_ c|_ p|"
    "e d|_a n"
).replace("_", "\u0120")
VOCAB_SIZE = 288  # 256 bytes, 26 merges, 4 special tokens, 2 unused rows: real checkpoints have those too

TOPICS = (
    "bread",
    "tea",
    "soup",
    "rice",
    "the garden",
    "the piano",
    "the bike",
    "chess",
    "a letter",
    "the map",
)
GOOD_ANSWERS = (
    "Take your time with {topic} and keep notes.",
    "Start with the basics of {topic}, then practise.",
    "Ask a friend who knows {topic} well.",
    "Read about {topic} first; small steps work best.",
)
BAD_ANSWERS = (
    "Skip {topic} and hope for the best.",
    "Never practise {topic}; guess instead.",
    "Ignore everyone who knows {topic}.",
    "Rush {topic} and read nothing.",
)


def make_tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a byte-level BPE tokenizer with a ChatML template; every text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|")]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (PAD_TOKEN, BOS_TOKEN, TURN_TOKEN, EOS_TOKEN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[TURN_TOKEN],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast


def make_tiny_model(
    architecture: str = "qwen2", dtype: "torch.dtype | str" = "float32", seed: int = 0, **overrides: Any
) -> "PreTrainedModel":
    """Build a random causal LM in eval mode.

    Args:
        architecture: One of `ARCHITECTURES`.
        dtype: Of the weights; they are drawn in float32 and cast, so all types hold the same model. A float64
            model computes in float64 throughout, so that tolerances can follow from that dtype.
        seed: Of the weights.
        overrides: Fields of the Hugging Face config, such as `num_hidden_layers` or `tie_word_embeddings`.
    """
    import torch
    import transformers

    from tests.oracle import entirely_float64

    names = {
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "llama": "Llama",
        "mistral": "Mistral",
        "gemma2": "Gemma2",
        "gemma3": "Gemma3",
        "phi3": "Phi3",
    }
    if architecture not in names:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, got {architecture!r}")
    name = names[architecture]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    layers = int(overrides.get("num_hidden_layers", 3))
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": name.startswith("Gemma"),
        "pad_token_id": VOCAB_SIZE - 6,
        "bos_token_id": VOCAB_SIZE - 5,
        "eos_token_id": VOCAB_SIZE - 3,
    }
    if name != "Phi3":
        fields["head_dim"] = 8
    if name.startswith("Gemma"):
        fields |= {"query_pre_attn_scalar": 8, "sliding_window": 16}
        fields["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if name == "Mistral":
        fields["sliding_window"] = 16
    config = config_class(**(fields | overrides))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif key.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)  # a norm: one in most models, an offset from one in Gemma
    resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = model.to(resolved)
    model.config.dtype = resolved
    model = model.eval()
    return entirely_float64(model) if resolved is torch.float64 else model


def make_tiny_folder(
    path: Path | str,
    architecture: str = "qwen2",
    dtype: "torch.dtype | str" = "float32",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write config, safetensors weights and tokenizer as `from_pretrained` reads them; returns the folder."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_model(architecture, dtype, seed, **overrides).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def chat_rows(num_rows: int) -> list[dict[str, Any]]:
    """Make different harmless conversations: every third has a system turn, every fourth a second answer."""
    rows = []
    for index in range(num_rows):
        topic = TOPICS[index % len(TOPICS)]
        answers = [GOOD_ANSWERS[(index + turn) % len(GOOD_ANSWERS)].format(topic=topic) for turn in range(2)]
        messages = [
            {"role": "user", "content": f"Day {index}: how do I begin with {topic}?"},
            {"role": "assistant", "content": answers[0]},
        ]
        if index % 3 == 0:
            messages.insert(0, {"role": "system", "content": "You are kind and brief."})
        if index % 4 == 0:
            messages += [
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": answers[1]},
            ]
        rows.append({"messages": messages})
    return rows


def answer_rows(num_rows: int) -> list[dict[str, str]]:
    """Make different harmless rows of the form question, good answer, bad answer."""
    rows = []
    for index in range(num_rows):
        topic = TOPICS[index % len(TOPICS)]
        rows.append(
            {
                "question": f"Day {index}: what helps with {topic}?",
                "good": GOOD_ANSWERS[index % len(GOOD_ANSWERS)].format(topic=topic),
                "bad": BAD_ANSWERS[index % len(BAD_ANSWERS)].format(topic=topic),
            }
        )
    return rows


def write_rows(path: Path | str, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line; returns the path."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_chat_rows(path: Path | str, num_rows: int = 40) -> Path:
    """Write `chat_rows(num_rows)` as a JSONL file of `messages`; returns the path."""
    return write_rows(path, chat_rows(num_rows))


def write_answer_rows(path: Path | str, num_rows: int = 40) -> Path:
    """Write `answer_rows(num_rows)` as a JSONL file of `question`, `good` and `bad`; returns the path."""
    return write_rows(path, answer_rows(num_rows))
