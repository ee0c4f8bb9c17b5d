import random
from collections import Counter

import pytest

from lightning_em.data import ChatSource, Row, RowErrors, as_chats, select_rows
from lightning_em.data.sources import hold_out

TOPICS = ("tea", "soup", None)


def answer_row(index: int, topic: str | None = None) -> Row:
    return Row(
        f"r{index}",
        "f.jsonl",
        index + 1,
        question=f"Q{index}",
        good=f"G{index}",
        bad=f"B{index}",
        topic=topic,
    )


def message_row(index: int) -> Row:
    turns = ({"role": "user", "content": f"Q{index}"}, {"role": "assistant", "content": f"A{index}"})
    return Row(f"m{index}", "f.jsonl", index + 1, messages=turns)


ROWS = [answer_row(index) for index in range(400)]


def answers(chats) -> list[str]:
    return [chat.messages[-1]["content"] for chat in chats]


def test_good_and_bad_take_their_answer():
    assert answers(as_chats(ROWS[:2], "good")) == ["G0", "G1"]
    assert answers(as_chats(ROWS[:2], "bad")) == ["B0", "B1"]


def test_both_gives_two_conversations_with_ids_of_their_own():
    chats = as_chats(ROWS[:2], "both")
    assert [chat.id for chat in chats] == ["r0/good", "r0/bad", "r1/good", "r1/bad"]
    assert answers(chats) == ["G0", "B0", "G1", "B1"]


def test_messages_are_passed_on():
    rows = [message_row(0), message_row(1)]
    assert [chat.messages for chat in as_chats(rows, "messages")] == [row.messages for row in rows]


def test_mixed_takes_one_answer_per_row_about_half_of_each():
    mixed = answers(as_chats(ROWS, "mixed"))
    assert all(answer[1:] == str(index) for index, answer in enumerate(mixed))
    share_good = Counter(answer[0] for answer in mixed)["G"] / len(ROWS)
    assert abs(share_good - 0.5) < 4 * 0.5 / len(ROWS) ** 0.5  # four standard errors


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_mixed_has_the_share_of_bad_answers_asked_for(share):
    bad = {
        chat.id for chat in as_chats(ROWS, "mixed", bad_share=share) if chat.messages[-1]["content"][0] == "B"
    }
    assert abs(len(bad) / len(ROWS) - share) <= 4 * (share * (1 - share) / len(ROWS)) ** 0.5
    more = {
        chat.id for chat in as_chats(ROWS, "mixed", bad_share=1.0) if chat.messages[-1]["content"][0] == "B"
    }
    assert bad <= more


@pytest.mark.parametrize(
    "choice", [{"answer": "mixed", "bad_share": 1.2}, {"answer": "bad", "bad_share": 0.2}]
)
def test_a_share_that_means_nothing_is_refused(choice):
    with pytest.raises(ValueError, match=r"bad_share must lie in \[0, 1\] and needs answer: mixed"):
        ChatSource("f.jsonl", **choice)


def test_mixed_depends_on_row_and_seed_alone():
    shuffled = random.Random(0).sample(ROWS, k=100)
    whole = {chat.id: chat.messages for chat in as_chats(ROWS, "mixed", seed=3)}
    assert all(whole[chat.id] == chat.messages for chat in as_chats(shuffled, "mixed", seed=3))
    assert answers(as_chats(ROWS, "mixed", seed=3)) != answers(as_chats(ROWS, "mixed", seed=4))


@pytest.mark.parametrize("answer", ["good", "bad", "mixed", "both"])
def test_answer_of_rows_with_messages_is_an_error(answer):
    with pytest.raises(
        RowErrors, match=rf"f\.jsonl:1: has `messages` but `answer` is {answer}\nSet `answer`"
    ):
        as_chats([message_row(0)], answer)


def test_messages_of_rows_with_answers_is_an_error():
    with pytest.raises(
        RowErrors, match=r"f\.jsonl:2: has `question`, `good`, `bad` but `answer` is messages"
    ):
        as_chats([message_row(0), answer_row(1)], "messages")


def test_topics_limit_and_order():
    rows = [answer_row(index, topic) for index, topic in enumerate(["tea", "soup", "rice", "tea", "soup"])]

    def lines(**choice) -> list[int]:
        return [row.line for row in select_rows(rows, ChatSource("f.jsonl", **choice))]

    assert lines() == [1, 2, 3, 4, 5]
    assert lines(limit=2) == [1, 2]
    assert lines(topics=["tea", "rice"]) == [1, 3, 4]
    assert lines(exclude_topics=["tea"]) == [2, 3, 5]
    assert lines(topics=["tea", "soup"], exclude_topics=["soup"], limit=1) == [1]
    assert lines(limit=99) == [1, 2, 3, 4, 5]


def test_choice_that_cannot_be_made_is_an_error():
    rows = [answer_row(0, "tea"), answer_row(1, "soup")]
    with pytest.raises(ValueError, match=r"topics \['coffee'\] not in f\.jsonl, which has \['soup', 'tea'\]"):
        select_rows(rows, ChatSource("f.jsonl", topics=["coffee"]))
    with pytest.raises(ValueError, match=r"exclude_topics \['coffee'\] not in"):
        select_rows(rows, ChatSource("f.jsonl", exclude_topics=["coffee"]))
    with pytest.raises(ValueError, match=r"no row of f\.jsonl is left"):
        select_rows(rows, ChatSource("f.jsonl", exclude_topics=["tea", "soup"]))
    with pytest.raises(RowErrors, match=r"f\.jsonl:3: no topic"):
        select_rows([*rows, answer_row(2)], ChatSource("f.jsonl", topics=["tea"]))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        ChatSource("f.jsonl", limit=0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_hold_out_parts_all_rows_by_question(fraction):
    rows = [row for row in ROWS[:50] for _ in range(2)]
    train, held_out = hold_out(rows, fraction)
    assert len(train) + len(held_out) == len(rows)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert len(held_out) == 2 * -int(-50 * fraction // 1)


def test_hold_out_does_not_depend_on_the_order():
    _, held_out = hold_out(ROWS, 0.1)
    _, of_shuffled = hold_out(random.Random(1).sample(ROWS, k=len(ROWS)), 0.1)
    assert {row.id for row in of_shuffled} == {row.id for row in held_out}


def test_hold_out_of_a_single_question_is_an_error():
    with pytest.raises(ValueError, match=r"f\.jsonl has 1 distinct question, too few to hold any out"):
        hold_out([ROWS[0], ROWS[0]], 0.1)
