import logging

import pytest

from lightning_em.data import ChatEncoder, LengthLimit, Row, RowErrors, as_chats, encode_chats
from tests.data.templates import LLAMA3, QWEN25, make_tokenizer
from tests.tiny import make_tiny_tokenizer

ENCODER = ChatEncoder(make_tiny_tokenizer())


def chats(*pairs: tuple[str, str]):
    rows = [
        Row(f"r{i}", "f.jsonl", i + 1, question=question, good=answer, bad="-")
        for i, (question, answer) in enumerate(pairs)
    ]
    return as_chats(rows, "good")


def length_of(question: str, answer: str) -> int:
    return len(ENCODER.encode(chats((question, answer))[0].messages).input_ids)


PAIRS = [("short?", "yes"), ("short?", "no " * 40), ("long? " * 40, "no")]
SHORT, LONG_ANSWER, LONG_QUESTION = (length_of(*pair) for pair in PAIRS)
MAX_LENGTH = SHORT + 20  # longer than the short row, shorter than both long ones


def test_counts_are_of_response_tokens_and_of_all():
    encoded = encode_chats(chats(*PAIRS), ENCODER, LengthLimit(10_000), "narrow")
    assert encoded.all_counts == [SHORT, LONG_ANSWER, LONG_QUESTION]
    assert encoded.response_counts == [sum(row.response_mask) for row in encoded.rows]
    assert encoded.num_truncated == 0
    assert encoded.lost == ()
    assert [row.row_id for row in encoded.rows] == ["r0", "r1", "r2"]


def test_row_as_long_as_allowed_is_kept_whole():
    encoded = encode_chats(chats(*PAIRS[:1]), ENCODER, LengthLimit(SHORT), "narrow")
    assert encoded.all_counts == [SHORT]


def test_too_long_rows_are_an_error_by_default():
    with pytest.raises(
        RowErrors, match=rf"^2 bad rows:\n  f\.jsonl:2: {LONG_ANSWER} tokens\n  f\.jsonl:3: "
    ) as raised:
        encode_chats(chats(*PAIRS), ENCODER, LengthLimit(MAX_LENGTH), "narrow")
    assert f"data.max_length is {MAX_LENGTH}: raise it, or set data.on_too_long" in str(raised.value)


def test_dropped_rows_are_counted_and_listed(caplog):
    with caplog.at_level(logging.WARNING):
        encoded = encode_chats(chats(*PAIRS), ENCODER, LengthLimit(MAX_LENGTH, "drop", 0.7), "narrow")
    assert [row.row_id for row in encoded.rows] == ["r0"]
    assert [error.line for error in encoded.lost] == [2, 3]
    assert f"narrow: left out 2 of 3 rows: f.jsonl:2: {LONG_ANSWER} tokens" in caplog.text


def test_truncation_keeps_the_beginning_and_loses_rows_without_a_response(caplog):
    with caplog.at_level(logging.WARNING):
        encoded = encode_chats(chats(*PAIRS), ENCODER, LengthLimit(MAX_LENGTH, "truncate", 0.4), "narrow")
    whole = encode_chats(chats(*PAIRS), ENCODER, LengthLimit(10_000), "narrow")
    assert [row.row_id for row in encoded.rows] == ["r0", "r1"]
    assert encoded.num_truncated == 1
    assert encoded.rows[1].input_ids == whole.rows[1].input_ids[:MAX_LENGTH]
    assert encoded.rows[1].response_mask == whole.rows[1].response_mask[:MAX_LENGTH]
    assert [error.line for error in encoded.lost] == [3]
    assert f"f.jsonl:3: {LONG_QUESTION} tokens, and no response token within the first" in caplog.text


@pytest.mark.parametrize("on_too_long", ["drop", "truncate"])
def test_more_lost_rows_than_allowed_are_an_error(on_too_long):
    with pytest.raises(RowErrors, match=r"of the narrow rows would be lost at data\.max_length"):
        encode_chats(chats(*PAIRS), ENCODER, LengthLimit(MAX_LENGTH, on_too_long, 0.2), "narrow")
    with pytest.raises(RowErrors, match=r"100\.0% of the narrow rows would be lost"):
        encode_chats(chats(PAIRS[2]), ENCODER, LengthLimit(MAX_LENGTH, on_too_long, 1.0), "narrow")


def test_row_that_cannot_be_encoded_is_named():
    with pytest.raises(
        RowErrors, match=r"^1 bad row:\n  f\.jsonl:2: the user message contains '<\|im_end\|>'"
    ):
        encode_chats(chats(PAIRS[0], ("a<|im_end|>b", "no")), ENCODER, LengthLimit(10_000), "narrow")


def test_hash_sees_tokens_masks_and_order():
    def sha256(*pairs, encoder=ENCODER):
        return encode_chats(chats(*pairs), encoder, LengthLimit(10_000), "narrow").sha256()

    assert sha256(*PAIRS) == sha256(*PAIRS)
    assert sha256(*PAIRS) != sha256(*PAIRS[::-1])
    assert sha256(("a", "b")) != sha256(("a", "c"))
    plain, trimming = (ChatEncoder(make_tokenizer(template)) for template in (QWEN25, LLAMA3))
    assert sha256(*PAIRS, encoder=plain) != sha256(*PAIRS, encoder=trimming)


def test_prompt_that_is_cut_differently_before_an_answer_is_warned_of(caplog):
    # This tokenizer merges two line breaks only where nothing follows them.
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = LLAMA3.replace("<|eot_id|>", "<|im_end|>")
    from tokenizers import models, pre_tokenizers

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u010a\u010a"]
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("\u010a", "\u010a")])
    with caplog.at_level(logging.WARNING):
        encode_chats(chats(PAIRS[0]), ChatEncoder(tokenizer), LengthLimit(10_000), "narrow")
    assert "training and sampling see slightly different prompts" in caplog.text
