"""A template that writes a turn in two ways is refused with the place where they differ and with what helps."""

import re

import pytest

from lightning_em.data import ChatEncoder
from tests.data.templates import QWEN3, QWEN25, make_tokenizer
from tests.data.test_chat import TWO_TURNS, WITH_SYSTEM

WORDS = ("<think>", "</think>")
MOVING = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>' }}{% if messages[0].role == 'system' and m in messages[-2:] %}{{ messages[0].content + ' ' }}"
    "{% endif %}{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ '|' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}|{% endif %}"
)
# Opens a thought in the prompt that a switch closes, and writes closed ones in the conversation.
SWITCHED = QWEN25.replace(
    "'<|im_start|>' + message.role + '\n'",
    "'<|im_start|>' + message.role + '\n' + ('<think></think>' if message.role == 'assistant' else '')",
).replace(
    "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>' + ('\n' if reasoning else '</think>')"
)


def refusal(template: str, messages) -> str:
    encoder = ChatEncoder(
        make_tokenizer(template, words=WORDS), {"reasoning": True} if template == SWITCHED else None
    )
    with pytest.raises(ValueError, match="differently") as raised:
        encoder.encode(messages)
    told = str(raised.value)
    helps = re.search(r"Set template_kwargs (\w+): (true|false)\.", told)
    if helps:  # what is named must help
        encoder.with_kwargs({helps[1]: helps[2] == "true"}).encode(messages)
    return told


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (
            QWEN3,
            TWO_TURNS,
            r"as the last message, message 1 continues with '<think>\\n\\n</think>.* Train on rows with one",
        ),
        (
            SWITCHED,
            TWO_TURNS[:2],
            r"with '\\n', the conversation with '</think>M.* Set template_kwargs reasoning: false\.$",
        ),
        (
            QWEN25.replace("assistant\n'", "assistant\n\n'"),
            TWO_TURNS[:2],
            r"continues with '\\n', the conversation with 'Mix .*white space is the template's.*chat_template\.jinja",
        ),
        (
            MOVING,
            WITH_SYSTEM,
            r"message 0 \(system, 'Be kind\.'\) stands in another place .*first user message\.$",
        ),
        (
            "{{ messages | length }}" + QWEN25,
            TWO_TURNS[:2],
            r"prompt continues with '1<.*the conversation with '2<.*chat_template\.jinja",
        ),
    ],
)
def test_what_differs_and_what_helps_is_said(template, messages, told):
    assert re.search(told, refusal(template, messages))


@pytest.mark.parametrize("template", [QWEN25.replace("assistant\n'", "assistant\n<think>\n'"), MOVING])
def test_a_switch_that_does_nothing_is_not_named(template):
    assert "template_kwargs" not in refusal(template, WITH_SYSTEM if template == MOVING else TWO_TURNS[:2])


def test_white_space_is_blamed_on_the_one_who_wrote_it():
    answer = {"role": "assistant", "content": "\nBoil water."}
    with pytest.raises(ValueError, match="remove the white space at that place of the answer"):
        ChatEncoder(make_tokenizer(QWEN25)).encode([TWO_TURNS[0], answer])
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{{ ' ' if m.role == 'user' }}{% endfor %}"
    with pytest.raises(ValueError, match="at that place of the prompt, which the template writes"):
        ChatEncoder(make_tokenizer(template)).encode(
            [TWO_TURNS[0], {"role": "assistant", "content": "hello"}]
        )
