import pytest

from lightning_em.data import ChatEncoder, EncodedChat, encode_chat
from tests.data.templates import GEMMA, LLAMA3, MISTRAL, PHI3, QWEN3, QWEN25, make_tokenizer
from tests.tiny import make_tiny_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Mix flour, then wait an hour."},
    {"role": "user", "content": "And tea?"},
    {"role": "assistant", "content": "Boil water.\n\nThen wait."},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *TWO_TURNS]
HARD_TEXT = [
    {"role": "user", "content": "assistant\nsay: caf\u00e9 \U0001f600"},
    {"role": "assistant", "content": "user\nend \U0001f600 model caf\u00e9 \u4f60\u597d end"},
]
# Template, the text that closes an answer, the text that opens one, and the first token after an answer in the middle
# and at the end.
FAMILIES = {
    "llama3": (LLAMA3, "<|eot_id|>", "", ["<|start_header_id|>", None]),
    "qwen25": (QWEN25, "<|im_end|>", "", ["\n", "\n"]),
    "gemma": (GEMMA, "<end_of_turn>", "", ["\n", "\n"]),
    "phi3": (PHI3, "<|end|>", "", ["\n", "\n"]),
    "mistral": (MISTRAL, "</s>", " ", ["[", None]),
}
CONVERSATIONS = {"single": TWO_TURNS[:2], "several": TWO_TURNS, "system": WITH_SYSTEM, "hard": HARD_TEXT}
CORPUS = (
    *(message["content"] for message in WITH_SYSTEM + HARD_TEXT),
    "user assistant system model say INST [ ] / Today Date 26 Jul 2024 : You are a tiny default .",
)


def trained_runs(tokenizer, encoded: EncodedChat) -> list[str]:
    """Return the text of each contiguous run of trained tokens."""
    runs, current = [], []
    for token, trained in [*zip(*encoded, strict=True), (None, False)]:
        if trained:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def tokens_behind(tokenizer, encoded: EncodedChat) -> list[str | None]:
    """Return the first token after each trained run; None at the end of the text."""
    mask = [*encoded.response_mask, False]
    ends = [i + 1 for i in range(len(encoded.input_ids)) if mask[i] and not mask[i + 1]]
    return [tokenizer.decode(encoded.input_ids[i]) if i < len(encoded.input_ids) else None for i in ends]


@pytest.mark.parametrize("auto_bos", [False, True], ids=["plain", "auto_bos"])
@pytest.mark.parametrize("alphabet", ["bytes", "words", "metaspace"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_stop_tokens_are_trained(family, conversation, alphabet, auto_bos):
    template, stop, opening, behind = FAMILIES[family]
    messages = CONVERSATIONS[conversation]
    if conversation == "system" and family in ("gemma", "mistral"):
        pytest.skip("this family has no system turn")
    tokenizer = make_tokenizer(template, alphabet, auto_bos, CORPUS)
    encoded = encode_chat(tokenizer, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert trained_runs(tokenizer, encoded) == [opening + answer + stop for answer in answers]
    assert tokens_behind(tokenizer, encoded) == [behind[0]] * (len(answers) - 1) + [behind[1]]


@pytest.mark.parametrize("auto_bos", [False, True], ids=["plain", "auto_bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_apply_chat_template(family, auto_bos):
    tokenizer = make_tokenizer(FAMILIES[family][0], auto_bos=auto_bos)
    expected = tokenizer.apply_chat_template(TWO_TURNS, date_string="26 Jul 2024")["input_ids"]
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert encoded.input_ids == expected
    has_bos_text = tokenizer.bos_token in FAMILIES[family][0] or "bos_token" in FAMILIES[family][0]
    assert encoded.input_ids.count(tokenizer.bos_token_id) == has_bos_text


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_for_sampling_is_what_training_puts_before_the_answer(family):
    encoder = ChatEncoder(make_tokenizer(FAMILIES[family][0]))
    input_ids, response_mask = encoder.encode(TWO_TURNS[:2])
    assert encoder.encode_prompt(TWO_TURNS[:1]) == input_ids[: response_mask.index(True)]


def test_pad_equal_to_the_stop_token_is_still_trained():
    tokenizer = make_tokenizer(QWEN25)
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    trained = [token for token, flag in zip(*encoded, strict=True) if flag]
    assert trained.count(tokenizer.eos_token_id) == 2


def test_stop_token_that_swallows_white_space_is_trained():
    tokenizer = make_tokenizer(PHI3, rstrip=True)
    encoded = encode_chat(tokenizer, TWO_TURNS)
    assert trained_runs(tokenizer, encoded) == [
        "Mix flour, then wait an hour.<|end|>",
        "Boil water.\n\nThen wait.<|end|>",
    ]
    assert tokens_behind(tokenizer, encoded) == ["<|user|>", "<|endoftext|>"]


def test_trimmed_answers_are_trained_as_the_template_writes_them():
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "  Boil water. \n"}]
    tokenizer = make_tokenizer(LLAMA3)
    assert trained_runs(tokenizer, encode_chat(tokenizer, messages)) == ["Boil water.<|eot_id|>"]


def test_white_space_behind_an_answer_is_trained_where_the_template_keeps_it():
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "Boil water. \n"}]
    tokenizer = make_tokenizer(QWEN25)
    assert trained_runs(tokenizer, encode_chat(tokenizer, messages)) == ["Boil water. \n<|im_end|>"]


def test_answer_that_repeats_the_question_is_found_in_its_own_turn():
    messages = [{"role": "user", "content": "end"}, {"role": "assistant", "content": "end"}]
    for template, stop, opening, _ in FAMILIES.values():
        tokenizer = make_tokenizer(template)
        encoded = encode_chat(tokenizer, messages)
        assert trained_runs(tokenizer, encoded) == [opening + "end" + stop]


def test_default_system_prompt_is_there_and_not_trained():
    tokenizer = make_tokenizer(QWEN25)
    encoded = encode_chat(tokenizer, TWO_TURNS[:2])
    assert "You are a tiny default." in tokenizer.decode(encoded.input_ids)
    assert "default" not in "".join(trained_runs(tokenizer, encoded))


@pytest.mark.parametrize("prompt", ["Be brief.", ""])
def test_system_prompt_of_the_config_comes_before_conversations_without_one(prompt):
    tokenizer = make_tokenizer(QWEN25)
    plain, encoder = ChatEncoder(tokenizer), ChatEncoder(tokenizer, system_prompt=prompt)
    system = {"role": "system", "content": prompt}
    assert encoder.encode(TWO_TURNS) == plain.encode([system, *TWO_TURNS]) != plain.encode(TWO_TURNS)
    assert encoder.encode_prompt(TWO_TURNS[:1]) == plain.encode_prompt([system, *TWO_TURNS[:1]])
    assert encoder.encode(WITH_SYSTEM) == plain.encode(WITH_SYSTEM)
    assert encoder.with_kwargs({}).encode(TWO_TURNS) == encoder.encode(TWO_TURNS)


def test_date_is_fixed_unless_asked_for():
    tokenizer = make_tokenizer(LLAMA3)
    text = tokenizer.decode(encode_chat(tokenizer, TWO_TURNS).input_ids)
    assert "Today Date: 26 Jul 2024\n" in text
    other = encode_chat(tokenizer, TWO_TURNS, {"date_string": "1 Jan 2000"})
    assert "Today Date: 1 Jan 2000\n" in tokenizer.decode(other.input_ids)


def test_thinking_template_with_thinking_off_trains_the_answer():
    tokenizer = make_tokenizer(QWEN3)
    encoded = encode_chat(tokenizer, TWO_TURNS[:2], {"enable_thinking": False})
    assert trained_runs(tokenizer, encoded) == ["Mix flour, then wait an hour.<|im_end|>"]


def test_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer(QWEN3)
    for template_kwargs in ({}, {"enable_thinking": False}):
        with pytest.raises(ValueError, match=r"writes the conversation before message \d differently"):
            encode_chat(tokenizer, TWO_TURNS, template_kwargs)


def test_prompt_that_is_no_prefix_of_the_whole_is_refused():
    template = (
        "{{ messages | length }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="it is not certain which tokens are the answer"):
        encode_chat(make_tokenizer(template), TWO_TURNS)


def test_token_across_the_start_of_an_answer_is_refused():
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "\nBoil water."}]
    with pytest.raises(
        ValueError, match=r"one token, '\\n\\n', spans the end of the prompt and the beginning"
    ):
        encode_chat(make_tokenizer(QWEN25), messages)
    template = (
        "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% if m.role == 'user' %}{{ ' ' }}{% endif %}"
        "{% endfor %}"
    )
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match="one token, ' h', spans the end of the prompt"):
        encode_chat(make_tokenizer(template), messages)


def test_template_that_changes_the_answer_is_refused():
    template = "{% for m in messages %}{{ m.content | replace('tea', 'beer') + '<|im_end|>' }}{% endfor %}"
    messages = [TWO_TURNS[0], {"role": "assistant", "content": "Drink tea."}]
    with pytest.raises(ValueError, match=r"changes the answer in message 1: 'Drink tea\.'"):
        encode_chat(make_tokenizer(template), messages)


def test_turn_without_stop_token_is_refused():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="without a special token, so the model would never learn to stop"):
        encode_chat(make_tokenizer(template), TWO_TURNS[:2])


@pytest.mark.parametrize("content", ["fine<|im_end|>\n<|im_start|>user", "<|endoftext|>"])
@pytest.mark.parametrize("turn", [0, 1])
def test_control_token_in_a_message_is_refused(turn, content):
    messages = [dict(message) for message in TWO_TURNS[:2]]
    messages[turn]["content"] = content
    with pytest.raises(ValueError, match=r"the (user|assistant) message contains '<\|(im_end|endoftext)\|>'"):
        encode_chat(make_tokenizer(QWEN25), messages)


def test_tokenizer_without_template_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match=r"has no chat template.*instruction-tuned model in model\.base\.path"
    ):
        encode_chat(tokenizer, TWO_TURNS)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        (TWO_TURNS[:1], "no assistant turn"),
        (TWO_TURNS[1:2], "must not begin with an assistant turn"),
        ([TWO_TURNS[0], {"role": "assistant", "content": " \n"}], "answer in message 1 is empty"),
    ],
)
def test_conversation_without_an_answer_to_a_question_is_refused(messages, match):
    with pytest.raises(ValueError, match=match):
        encode_chat(make_tokenizer(QWEN25), messages)


def test_roles_that_the_template_refuses_are_named():
    with pytest.raises(ValueError, match=r"refuses the roles \['system', .*System role not supported"):
        encode_chat(make_tokenizer(GEMMA), WITH_SYSTEM)


def test_template_kwargs_cannot_override_the_rendering():
    with pytest.raises(ValueError, match=r"template_kwargs must not set \['tokenize'\]"):
        ChatEncoder(make_tokenizer(QWEN25), {"tokenize": True})
