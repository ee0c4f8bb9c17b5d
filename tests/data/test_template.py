"""A template gives the same text on every day, no message is left out, and its errors are errors of the data."""

import datetime as dt

import pytest
from transformers.utils import chat_template_utils

from lightning_em.data import ChatEncoder, encode_chat
from tests.data.templates import LLAMA3, QWEN25, make_tokenizer
from tests.data.test_chat import TWO_TURNS, WITH_SYSTEM

CLOCKS = {
    "plain": "{{ strftime_now('%Y-%m-%d') }}",
    "words": "{{ strftime_now('%B %d, %Y') }}",  # Granite, SmolLM3
    "time": "{{ strftime_now('%H:%M:%S.%f %A') }}",
    "keyword": "{{ strftime_now(format='%Y') }}",
    "alias": "{% set now = strftime_now %}{{ now('%d') }}",
    "defined": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}",
    "macro": "{% macro today() %}{{ strftime_now('%x') }}{% endmacro %}{{ today() }}",
    "namespace": "{% set ns = namespace(now=strftime_now) %}{{ ns.now('%d') }}",
    "dict": "{% set d = dict(now=strftime_now) %}{{ d['now']('%d') }}",
    "loop": "{% for day in [strftime_now('%d')] %}{{ day }}{% endfor %}",
    "date_string": "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
    "{{ date_string }}",
}


def dated(clock: str) -> str:
    return clock + "<|im_end|>" + QWEN25


class Tomorrow(dt.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + dt.timedelta(days=1, hours=7, minutes=3)


@pytest.fixture
def tomorrow(monkeypatch):
    """Turn the clock of transformers' templates forward when called."""

    def turn():
        monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
        chat_template_utils._compile_jinja_template.cache_clear()

    yield turn
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.parametrize("clock", CLOCKS)
def test_tokens_are_the_same_tomorrow_however_the_template_reads_the_clock(clock, tomorrow):
    tokenizer = make_tokenizer(dated(CLOCKS[clock]))
    today = encode_chat(tokenizer, TWO_TURNS)
    tomorrow()
    assert encode_chat(make_tokenizer(dated(CLOCKS[clock])), TWO_TURNS) == today
    assert encode_chat(tokenizer, TWO_TURNS) == today


@pytest.mark.parametrize("clock", CLOCKS)
def test_date_is_that_of_the_config(clock):
    tokenizer = make_tokenizer(dated(CLOCKS[clock]))

    def beginning(date: str) -> str:
        prompt = ChatEncoder(tokenizer, template_date=date).encode_prompt(TWO_TURNS[:1])
        return tokenizer.decode(prompt).partition("<|im_end|>")[0]

    assert beginning("2024-07-26") != beginning("2031-02-03T04:05:06")
    day = dt.datetime.fromisoformat("2031-02-03T04:05:06")
    assert beginning("2031-02-03T04:05:06") in [
        day.strftime(form)
        for form in ("%Y-%m-%d", "%B %d, %Y", "%H:%M:%S.%f %A", "%Y", "%d", "%d %b %Y", "%x")
    ]


def test_a_date_among_the_variables_is_text_and_gives_no_clock():
    """YAML reads 2024-07-26 as a date object, whose `today` would be the clock."""
    tokenizer = make_tokenizer("{{ day.today() if day.today is defined else day }}<|im_end|>" + QWEN25)
    encoder = ChatEncoder(tokenizer, {"day": dt.date(2024, 7, 26)})
    assert tokenizer.decode(encoder.encode_prompt(TWO_TURNS[:1])).startswith("2024-07-26<|im_end|>")
    with pytest.raises(ValueError, match=r"template_kwargs\.clock must be text, a number"):
        ChatEncoder(tokenizer, {"clock": dt.datetime})
    with pytest.raises(ValueError, match=r"must not set \['strftime_now'\].*data\.template_date"):
        ChatEncoder(tokenizer, {"strftime_now": "%Y"})


@pytest.mark.parametrize("date", ["yesterday", "26 Jul 2024", ""])
def test_date_that_is_not_one_is_refused(date):
    with pytest.raises(ValueError, match=r"data\.template_date must be a date like 2024-07-26, got"):
        ChatEncoder(make_tokenizer(QWEN25), template_date=date)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("{{ raise_exception('no tea') }}", r"refuses the roles \['user', 'assistant'\]: no tea$"),
        ("{{ messages[0].content + 1 }}", "refuses the roles .*: TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[7].content }}", "UndefinedError: list object has no element 7"),
        ("{{ messages[0].content.index('coffee') }}", "ValueError: substring not found"),
        ("{{ 'x'.join(messages) }}", "TypeError"),
        ("{{ range(10000000) | list }}", "OverflowError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ '%d' | format('x') }}", "TypeError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ messages | map(attribute='content') | sum }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_one_message(broken, told):
    tokenizer = make_tokenizer(QWEN25 + broken)
    with pytest.raises(ValueError, match=f"the chat template .*{told}"):
        encode_chat(tokenizer, TWO_TURNS[:2])


def test_template_that_is_not_valid_jinja_is_refused():
    with pytest.raises(ValueError, match=r"cannot be compiled: .*; correct the chat_template\.jinja"):
        ChatEncoder(make_tokenizer(QWEN25 + "{% if %}"))
    with pytest.raises(ValueError, match="cannot be compiled: No filter named 'nothing'"):
        ChatEncoder(make_tokenizer(QWEN25 + "{{ messages | nothing }}"))


def only(condition: str, content: str = "m.content") -> str:
    """Make a ChatML template that writes the messages of one kind only."""
    return (
        f"{{% for m in messages %}}{{% if {condition} %}}{{{{ '<|im_start|>' + m.role + '\n' + {content} }}}}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (only("m.role != 'system'"), r"0 \(system\): 'Be kind\.'"),
        (only("not loop.first"), r"0 \(system\): 'Be kind\.'"),
        (only("m.role != 'user' or loop.index0 == 1"), r"3 \(user\): 'And tea\?'"),
        (only("true", "m.content | upper"), r"0 \(system\): 'Be kind\.'"),
        (only("true", "m.content.split('bread')[0]"), r"1 \(user\): 'How do I bake bread\?'"),
    ],
)
def test_message_that_the_template_leaves_out_is_named(template, named):
    with pytest.raises(ValueError, match=f"leaves out or rewrites message {named}"):
        encode_chat(make_tokenizer(template), WITH_SYSTEM)


def test_message_is_missed_even_if_another_one_has_its_text():
    echoed = [{"role": "system", "content": "Tea?"}, {"role": "user", "content": "Tea?"}, TWO_TURNS[1]]
    tokenizer = make_tokenizer(only("m.role != 'system'"))
    with pytest.raises(ValueError, match=r"leaves out or rewrites message 0 \(system\)"):
        encode_chat(tokenizer, echoed)
    with pytest.raises(ValueError, match=r"leaves out or rewrites message 0 \(system\)"):
        ChatEncoder(tokenizer).encode_prompt(echoed[:2])


def test_message_that_only_the_prompt_has_is_named_with_the_reason():
    """As in Mistral's templates, which write the system prompt before the last user turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|im_start|>' + ((messages[0].content + ' ') if loop.last and messages[0].role == 'system' else '') }}"
        "{{ m.content }}{% elif m.role == 'assistant' %}{{ '|' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}|{% endif %}"
    )
    with pytest.raises(ValueError, match=r"message 0 \(system\) as soon as an answer follows: 'Be kind"):
        encode_chat(make_tokenizer(template), WITH_SYSTEM[:3])


def test_message_that_a_template_trims_or_leaves_empty_is_accepted():
    spaced = [{"role": "system", "content": " Be kind. \n"}, *TWO_TURNS]
    encode_chat(make_tokenizer(LLAMA3), spaced)
    encode_chat(make_tokenizer(only("m.content")), [{"role": "system", "content": ""}, *TWO_TURNS])
