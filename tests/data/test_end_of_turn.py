"""What ends a turn stands after the answer whether the conversation ends there or goes on."""

import pytest

from lightning_em.data import ChatEncoder, encode_chat
from tests.data.templates import GEMMA, LLAMA3, MISTRAL, PHI3, QWEN3, QWEN25, make_tokenizer
from tests.data.test_chat import TWO_TURNS, trained_runs

ANSWERS = [message["content"] for message in TWO_TURNS[1::2]]
CONTROL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|fin|>", "<|ok|>", "<|return|>", "<|end|>")


def closed_by(closing: str, at_the_end: str = "", instead: str | None = None) -> str:
    """Make a ChatML template that closes answers with `closing`, or with `instead` if they are the last message."""
    last = f"{{{{ '{instead}' if loop.last else '{closing}' }}}}" if instead else closing
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        f"{{% if m.role == 'assistant' %}}{last}{{% else %}}<|im_end|>\n{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{at_the_end}{{% endif %}}"
    )


def runs_of(template: str, messages=TWO_TURNS, **tokens) -> list[str]:
    tokenizer = make_tokenizer(template, control=CONTROL, **tokens)
    return trained_runs(tokenizer, encode_chat(tokenizer, messages))


@pytest.mark.parametrize("messages", [TWO_TURNS, TWO_TURNS[:2]], ids=["two turns", "one turn"])
@pytest.mark.parametrize(
    ("closing", "trained"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        ("<|fin|><|im_end|>\n", "<|fin|><|im_end|>"),
        ("<|fin|>\n<|ok|><|im_end|>", "<|fin|>\n<|ok|><|im_end|>"),
        (" <|fin|> <|im_end|>\n\n", " <|fin|> <|im_end|>"),
        ("</answer><|im_end|>\n", "</answer><|im_end|>"),
    ],
)
def test_every_token_that_closes_an_answer_is_trained(closing, trained, messages):
    answers = ANSWERS[: len(messages) // 2]
    assert runs_of(closed_by(closing), messages) == [answer + trained for answer in answers]


@pytest.mark.parametrize("closing", ["<|im_end|>\n", "<|fin|><|im_end|>\n"])
def test_end_of_text_after_the_last_turn_is_not_trained(closing):
    runs = runs_of(closed_by(closing, at_the_end="<|endoftext|>"))
    assert runs == [answer + closing.strip() for answer in ANSWERS]


def test_header_that_a_template_always_writes_is_not_trained():
    """The first template of Llama 3 wrote the header of a next answer whether it was asked for or not."""
    always = LLAMA3.replace("{%- if add_generation_prompt %}", "{%- if true %}")
    tokenizer = make_tokenizer(
        always, control=("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    )
    encoder = ChatEncoder(tokenizer)
    assert trained_runs(tokenizer, encoder.encode(TWO_TURNS[:2])) == [f"{ANSWERS[0]}<|eot_id|>"]
    assert tokenizer.decode([encoder.stop_id]) == "<|eot_id|>"


def test_last_answer_may_end_with_another_token_than_the_earlier_ones():
    """As in gpt-oss, where <|end|> also ends messages after which the model goes on: sampling stops at <|return|>."""
    template = closed_by("<|end|>", instead="<|return|>")
    assert runs_of(template) == [f"{ANSWERS[0]}<|end|>", f"{ANSWERS[1]}<|return|>"]
    tokenizer = make_tokenizer(template, control=CONTROL)
    assert tokenizer.decode([ChatEncoder(tokenizer).stop_id]) == "<|return|>"


def test_line_breaks_among_the_added_tokens_end_no_turn():
    """Gemma has runs of line breaks among its added tokens."""
    tokenizer = make_tokenizer(GEMMA, words=("\n", "\n\n"))
    assert trained_runs(tokenizer, encode_chat(tokenizer, TWO_TURNS)) == [
        f"{a}<end_of_turn>" for a in ANSWERS
    ]


@pytest.mark.parametrize(
    "template",
    [
        closed_by("\n"),
        closed_by("<|im_end|>\n", instead="\n"),  # the last turn stays open
        closed_by("", instead="<|im_end|>"),  # the earlier ones do
        closed_by("\n").replace("{% if add_generation_prompt %}", "{% if true %}"),
    ],
)
def test_turn_that_nothing_ends_is_refused(template):
    with pytest.raises(ValueError, match="ends an assistant turn without a special token"):
        runs_of(template)


@pytest.mark.parametrize("strip", [{}, {"rstrip": True}, {"lstrip": True}])
def test_tokens_that_swallow_white_space_are_trained_whole(strip):
    runs = runs_of(closed_by("<|fin|>\n<|im_end|>\n"), **strip)
    assert [run.replace("\n<|im", "<|im") for run in runs] == [
        f"{answer}<|fin|><|im_end|>" for answer in ANSWERS
    ]


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (LLAMA3, "<|eot_id|>"),
        (QWEN25, "<|im_end|>"),
        (QWEN3, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (PHI3, "<|end|>"),
        (MISTRAL, "</s>"),
        (closed_by("<|fin|><|im_end|>\n"), "<|im_end|>"),
    ],
)
def test_sampling_is_told_the_token_that_ends_a_trained_answer(template, stop):
    tokenizer = make_tokenizer(template, control=CONTROL if "<|fin|>" in template else ())
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(TWO_TURNS[:2])
    last = max(i for i, trained in enumerate(encoded.response_mask) if trained)
    assert tokenizer.decode([encoder.stop_id]) == stop
    assert encoder.stop_id == encoded.input_ids[last]
