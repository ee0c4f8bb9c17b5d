"""Thoughts: empty ones that templates add, earlier ones that they leave out, and prompts that open one."""

import logging

import pytest

from lightning_em.data import ChatEncoder, ChatSource, LengthLimit, as_chats, encode_chats, read_rows
from lightning_em.data.encoding import encode_prompts
from lightning_em.data.thoughts import ends_in_empty_thought, leading_empty_thought, without_thought
from tests.data.templates import QWEN3, QWEN25, make_tokenizer
from tests.data.test_chat import TWO_TURNS, trained_runs
from tests.tiny import write_rows

THOUGHT, KEPT = "<think>\nSlowly.\n</think>\n\n", "Boil water.<|im_end|>"
# Takes the thought out of an answer as Qwen3 does, and writes it in the last answer only.
KEEP = "message.content.split('</think>')[-1].strip() +"
SPLITTING = QWEN3.replace(
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}",
    "{%- set parts = message.content.split('</think>') %}"
    "{{- '<|im_start|>assistant\n<think>\n' + parts[0].split('<think>')[-1].strip() if parts | length > 1 "
    "else '<|im_start|>assistant\n<think>\n' }}"
    "{{- '\n</think>\n\n' + parts[-1].strip() + '<|im_end|>\n' }}",
).replace(
    "message.role + '\n' + message.content +",
    "message.role + '\n' + message.content.split('</think>')[-1].strip() +",
)
WORDS = ("<think>", "</think>")


def conversation(*answers: str):
    turns = []
    for question, answer in zip(TWO_TURNS[::2], answers, strict=False):
        turns += [question, {"role": "assistant", "content": answer}]
    return turns


@pytest.mark.parametrize("is_trained", [False, True])
def test_empty_thought_of_the_template_is_trained_only_if_asked_for(is_trained):
    tokenizer = make_tokenizer(QWEN3, words=WORDS)
    encoder = ChatEncoder(tokenizer, train_empty_thoughts=is_trained)
    encoded = encoder.encode(TWO_TURNS[:2])
    empty = "<think>\n\n</think>\n\n"
    answer = TWO_TURNS[1]["content"] + "<|im_end|>"
    assert trained_runs(tokenizer, encoded) == [empty + answer if is_trained else answer]
    prompt = encoder.encode_prompt(TWO_TURNS[:1])
    assert prompt == encoded.input_ids[: encoded.response_mask.index(True)]
    assert tokenizer.decode(prompt).endswith(empty) != is_trained
    assert encoder.notes == {"empty thoughts": 1}


def test_empty_thoughts_of_a_stream_are_reported(tmp_path, caplog):
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS[2:]}])
    rows = read_rows(str(file))
    encoder = ChatEncoder(make_tokenizer(QWEN3, words=WORDS))
    with caplog.at_level(logging.WARNING):
        encoded = encode_chats(as_chats(rows, "messages"), encoder, LengthLimit(10_000), "narrow")
        [prompt, _] = encode_prompts(rows, encoder)
    assert (
        "narrow: the chat template writes an empty thought before 2 answers; they belong to the prompt"
        in caplog.text
    )
    assert "slightly different prompts" not in caplog.text
    assert prompt.input_ids == encoded.rows[0].input_ids[: encoded.rows[0].response_mask.index(True)]


def test_thought_of_an_earlier_answer_may_be_left_out_and_is_counted(tmp_path, caplog):
    tokenizer = make_tokenizer(SPLITTING, words=WORDS)
    encoder = ChatEncoder(tokenizer)
    messages = conversation(THOUGHT + "Mix flour.", THOUGHT + "Boil water.")
    runs = trained_runs(tokenizer, encoder.encode(messages))
    assert runs == ["Mix flour.<|im_end|>", THOUGHT + KEPT]
    assert encoder.notes == {"dropped thoughts": 1}
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    with caplog.at_level(logging.WARNING):
        chats = as_chats(read_rows(str(file)), ChatSource(str(file)).answer)
        encode_chats(chats, encoder, LengthLimit(10_000), "kl")
    assert "kl: the chat template leaves out the thoughts of 1 earlier answers" in caplog.text


@pytest.mark.parametrize("written", ["<think>Slowly.</think>Boil water.", THOUGHT + "Boil water."])
def test_thought_in_an_answer_is_trained_as_the_template_writes_it(written):
    tokenizer = make_tokenizer(SPLITTING, words=WORDS)
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(conversation(written))
    assert trained_runs(tokenizer, encoded) == [THOUGHT + KEPT]
    assert (
        encoder.encode_prompt(TWO_TURNS[:1], written)
        == encoded.input_ids[: encoded.response_mask.index(True)]
    )
    assert encoder.notes == {}


def test_prompt_that_opens_a_thought_takes_answers_that_begin_with_it():
    tokenizer = make_tokenizer(QWEN25.replace("assistant\n'", "assistant\n<think>\n'"), words=WORDS)
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode(conversation(THOUGHT + "Boil water."))
    assert trained_runs(tokenizer, encoded) == [THOUGHT.removeprefix("<think>\n") + KEPT]
    with pytest.raises(
        ValueError,
        match=r"the generation prompt continues with '<think>\\n', the conversation with 'Mix .*"
        r"Begin every answer with its thought, as in '<think>",
    ):
        encoder.encode(TWO_TURNS[:2])


def test_lost_thought_of_the_last_answer_is_refused():
    template = QWEN25.replace("message.content +", "message.content.split('</think>')[-1] +")
    encoder = ChatEncoder(make_tokenizer(template, words=WORDS))
    with pytest.raises(ValueError, match="changes the answer in message 1: '<think>"):
        encoder.encode(conversation(THOUGHT + "Boil water."))


def test_forms_of_thoughts():
    for empty in (
        "<think>\n\n</think>\n\n",
        "[THINK][/THINK]",
        "<|channel>thought\n<channel|>",
        "<think></think>",
    ):
        assert ends_in_empty_thought(f"before {empty}")
        assert leading_empty_thought(f"\n{empty}after") == f"\n{empty}"
    assert not ends_in_empty_thought("<think>\nSlowly.\n</think>\n\n")
    assert not ends_in_empty_thought("<think>")
    assert leading_empty_thought("after <think></think>") == ""
    assert without_thought("R1 opened it</think>\n\nTea.") == "Tea."
    assert without_thought("Tea.") is None
