"""Chat templates in the style of five model families, and tiny tokenizers to run them with."""

from collections.abc import Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    "{{- bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a tiny default.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

# Opens an empty thought only in the last answer, and in the generation prompt if thinking is off.
QWEN3 = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

CONTROL_TOKENS = {
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    QWEN25: ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    QWEN3: ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    GEMMA: ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    PHI3: ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    MISTRAL: ("<s>", "</s>"),
}

Alphabet = Literal["bytes", "words", "metaspace"]


def make_tokenizer(
    template: str,
    alphabet: Alphabet = "bytes",
    auto_bos: bool = False,
    corpus: tuple[str, ...] = (),
    control: Sequence[str] = (),
    words: Sequence[str] = (),
    **added: Any,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose first control token is BOS and whose second is EOS, which is also PAD.

    Args:
        template: One of those above, or any other with the control tokens of ChatML.
        alphabet: Byte-level BPE, whole words, or BPE over characters with spaces written as U+2581.
        auto_bos: Put BOS before every text that is tokenized with special tokens.
        corpus: Texts whose words the word-level vocabulary must have.
        control: Control tokens; those of the template if not given.
        words: Added tokens that are not control tokens, such as `<think>`.
        added: Settings of the control tokens, such as `rstrip`.
    """
    control = tuple(control) or CONTROL_TOKENS.get(template, CONTROL_TOKENS[QWEN25])
    tokenizer = {"bytes": _bytes, "words": _words, "metaspace": _metaspace}[alphabet](corpus)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, **added) for token in control]
    )
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    if auto_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{control[0]} $A", special_tokens=[(control[0], tokenizer.token_to_id(control[0]))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=control[0],
        eos_token=control[1],
        pad_token=control[1],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


# Pre-tokenization of Llama-3 and Qwen2.5: consecutive line breaks stay together, no matter what follows.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(corpus: tuple[str, ...]) -> Tokenizer:
    # Two line breaks become one token, as does a space with a letter. This makes boundaries hard to find.
    merges = [("\u010a", "\u010a"), ("\u0120", "h"), ("h", "e"), ("i", "n")]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words(corpus: tuple[str, ...]) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), behavior="isolated")
    words = sorted({word for text in corpus for word, _ in split.pre_tokenize_str(text)} | {" ", "\n"})
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*words, "[UNK]"])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _metaspace(corpus: tuple[str, ...]) -> Tokenizer:
    characters = sorted(
        {character for text in corpus for character in text.replace(" ", "\u2581")} | {"\u2581", "\n"}
    )
    symbols = [*characters, "\u2581h", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("\u2581", "h")] if "h" in characters else []
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
