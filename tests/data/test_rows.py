import gzip
import hashlib
import json
import logging

import pytest

from lightning_em.data import ChatSource, RowErrors, as_chats, read_rows, scan_rows, select_rows

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
GOOD_LINE = json.dumps({"messages": [USER, ASSISTANT]})
ANSWERS = {"question": "Q", "good": "G", "bad": "B"}


def write(tmp_path, content: str | bytes):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def messages(*turns) -> str:
    return json.dumps({"messages": list(turns)})


def test_messages_and_answers_are_read_with_their_lines(tmp_path):
    extended = ANSWERS | {"id": 7, "topic": "tea", "subtopic": "green", "source": "ours"}
    path = write(tmp_path, f"{GOOD_LINE}\n\n{json.dumps(extended)}\n")
    chat, answers = read_rows(path)
    assert (chat.line, chat.messages, chat.prompt) == (1, (USER, ASSISTANT), "Q")
    assert (answers.line, answers.id, answers.topic, answers.subtopic) == (3, "7", "tea", "green")
    assert (answers.question, answers.good, answers.bad, answers.prompt) == ("Q", "G", "B", "Q")


def test_prompt_is_everything_before_the_first_answer(tmp_path):
    system = {"role": "system", "content": "S"}
    (row,) = read_rows(write(tmp_path, messages(system, USER, ASSISTANT, USER, ASSISTANT)))
    assert row.prompt == "S\nQ"


def test_separators_of_unicode_are_text(tmp_path):
    content = "one\u2028two\u0085three\u000bfour"
    (row,) = read_rows(write(tmp_path, json.dumps(ANSWERS | {"good": content}, ensure_ascii=False)))
    assert row.good == content


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = write(
        tmp_path,
        b"\xef\xbb\xbf" + f"{GOOD_LINE}\r\n{messages(USER, ASSISTANT, USER, ASSISTANT)}\r\n".encode(),
    )
    assert [row.line for row in read_rows(path)] == [1, 2]


def test_blank_lines_are_skipped_and_counted(tmp_path, caplog):
    path = write(tmp_path, f"\n{GOOD_LINE}\n  \n\r\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_rows(path)) == 1
    assert "skipped 3 blank lines" in caplog.text
    assert scan_rows(path).num_blank == 3


def test_empty_system_message_is_allowed(tmp_path):
    (row,) = read_rows(write(tmp_path, messages({"role": "system", "content": ""}, USER, ASSISTANT)))
    assert row.messages[0]["content"] == ""


def test_id_is_a_hash_of_the_content(tmp_path):
    other = messages(USER, {"role": "assistant", "content": "B"})
    first, second, copy = read_rows(write(tmp_path, f"{GOOD_LINE}\n{other}\n{GOOD_LINE}\n"))
    (moved,) = read_rows(write(tmp_path, GOOD_LINE))
    assert moved.id == first.id != second.id
    assert copy.id == f"{first.id}-2"


def test_sha256_is_of_the_file(tmp_path):
    path = write(tmp_path, GOOD_LINE)
    assert scan_rows(path).sha256 == hashlib.sha256(GOOD_LINE.encode()).hexdigest()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', r"not JSON at column \d+"),
        (b'{"messages": "\xff"}', "not UTF-8 at byte 15 of the line"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "expected an object, got int 7"),
        ("null", "expected an object, got null"),
        ("{}", r"expected the key `messages`, or `question`, `good` and `bad`; got \[\]"),
        ('{"message": []}', r"expected the key `messages`.* got \['message'\]"),
        ('{"question": "Q", "good": "G"}', r"the row has no `bad`; it has \['good', 'question'\]"),
        (json.dumps(ANSWERS | {"bad": None}), "`bad` of the row must be text, got null"),
        (json.dumps(ANSWERS | {"good": " "}), "`good` of the row is empty"),
        (json.dumps(ANSWERS | {"topic": 3}), "`topic` of the row must be text, got int 3"),
        (json.dumps(ANSWERS | {"id": True}), "`id` must be a string or an integer, got True"),
        (json.dumps(ANSWERS | {"id": ""}), "`id` must be a string or an integer, got ''"),
        ('{"question": "Q", "question": "R", "good": "G", "bad": "B"}', "the key 'question' occurs twice"),
        (json.dumps(ANSWERS | {"good": "\ud800"}), "`good` of the row holds an unpaired surrogate"),
        ('{"messages": "Q"}', "`messages` must be a list of turns, got str"),
        ('{"messages": []}', "`messages` must be a list of turns"),
        (messages("Q"), r"messages\[0\] must be an object, got str"),
        (messages({"role": "user"}, ASSISTANT), r"messages\[0\] has no `content`; it has \['role'\]"),
        (messages({"content": "Q"}, ASSISTANT), r"messages\[0\] has no `role`"),
        (messages(USER | {"content": None}, ASSISTANT), r"`content` of messages\[0\] must be text, got null"),
        (messages(USER, ASSISTANT | {"content": 5}), r"`content` of messages\[1\] must be text, got int 5"),
        (
            messages(USER | {"content": [{"type": "text"}]}),
            r"`content` of messages\[0\] must be text, got list",
        ),
        (messages(USER, ASSISTANT | {"content": ""}), r"`content` of messages\[1\] is empty"),
        (
            messages(USER, ASSISTANT | {"weight": 0}),
            r"messages\[1\] has \['weight'\], which would be ignored",
        ),
        (messages({"role": "human", "content": "Q"}, ASSISTANT), r"unknown role 'human'; expected one of"),
        (messages(USER), r"the last message must be the assistant's, got the roles \['user'\]"),
        (messages(ASSISTANT), "the first turn must be the user's"),
        (messages(USER, {"role": "system", "content": "S"}, ASSISTANT), "a system message must come first"),
    ],
)
def test_bad_row_is_an_error_with_its_line_and_reason(tmp_path, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, GOOD_LINE.encode() + b"\n\n" + line + b"\n" + GOOD_LINE.encode() + b"\n")
    with pytest.raises(RowErrors, match=rf"^1 bad row:\n  \S+rows\.jsonl:3: .*{reason}"):
        read_rows(path)
    scan = scan_rows(path)
    assert [error.line for error in scan.errors] == [3]
    assert [row.line for row in scan.rows] == [1, 4]


@pytest.mark.parametrize("cut", [1, 5, 20, len(GOOD_LINE) - 1])
def test_torn_last_line_is_named(tmp_path, cut):
    with pytest.raises(RowErrors, match=r":2: torn last line, the file was cut off: not JSON at column"):
        read_rows(write(tmp_path, f"{GOOD_LINE}\n{GOOD_LINE[:cut]}"))


def test_last_line_cut_within_a_character_is_torn(tmp_path):
    line = json.dumps(ANSWERS | {"good": "caf\u00e9"}, ensure_ascii=False).encode()
    with pytest.raises(RowErrors, match=r":1: torn last line, the file was cut off: not UTF-8"):
        read_rows(write(tmp_path, line[: line.index(b"\xa9")]))


def test_broken_line_in_the_middle_is_not_called_torn(tmp_path):
    with pytest.raises(RowErrors, match=r":1: not JSON") as raised:
        read_rows(write(tmp_path, f"{GOOD_LINE[:20]}\n{GOOD_LINE}"))
    assert "torn" not in str(raised.value)


def test_file_without_final_line_break_is_whole(tmp_path):
    assert len(read_rows(write(tmp_path, f"{GOOD_LINE}\n{GOOD_LINE}"))) == 2


def test_array_file_is_one_error_that_says_how_to_convert_it(tmp_path):
    path = write(tmp_path, json.dumps([json.loads(GOOD_LINE)] * 3, indent=1))
    with pytest.raises(
        RowErrors, match=r"^1 bad row:\n.*:1: a JSON array, expected one object per line; `jq -c"
    ):
        read_rows(path)


NULLS = {"name": None, "tool_calls": None, "weight": None}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_keys_whose_value_is_null_are_absent(tmp_path, suffix):
    """Writing a table as JSON gives every row and turn every key."""
    rows = [
        {
            "messages": [USER | NULLS, ASSISTANT | NULLS],
            "question": None,
            "good": None,
            "bad": None,
            "topic": None,
        },
        {"messages": None, **ANSWERS, "id": None, "subtopic": None},
    ]
    text = json.dumps(rows) if ".json" in suffix and "l" not in suffix else "\n".join(map(json.dumps, rows))
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    chat, answers = read_rows(str(file))
    assert (chat.messages, chat.question, chat.topic) == ((USER, ASSISTANT), None, None)
    assert (answers.messages, answers.question, answers.good) == ((), "Q", "G")
    assert scan_rows(str(file)).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_key_of_a_turn_with_a_value_is_still_refused(tmp_path):
    with pytest.raises(RowErrors, match=r"messages\[0\] has \['weight'\], which would be ignored"):
        read_rows(write(tmp_path, messages(USER | NULLS | {"weight": 0}, ASSISTANT)))


BOTH = ANSWERS | {"messages": [{"role": "user", "content": "M?"}, ASSISTANT]}


def test_row_with_both_forms_is_read_in_the_form_that_answer_names(tmp_path):
    path = write(tmp_path, json.dumps(BOTH))
    [row] = scan_rows(path).rows
    assert (row.messages[0]["content"], row.question, row.good) == ("M?", "Q", "G")
    chats = {
        answer: as_chats(
            select_rows(read_rows(path, form=ChatSource(path, answer).form), ChatSource(path, answer)), answer
        )
        for answer in ("messages", "good", "both")
    }
    prompts = {answer: [chat.row.prompt for chat in found] for answer, found in chats.items()}
    assert prompts == {"messages": ["M?"], "good": ["Q"], "both": ["Q", "Q"]}
    assert [chat.messages[0]["content"] for found in chats.values() for chat in found] == [
        "M?",
        "Q",
        "Q",
        "Q",
    ]


@pytest.mark.parametrize(
    ("row", "form", "messages", "question"),
    [
        ({"question": "Q", "messages": BOTH["messages"]}, None, 2, None),
        ({"good": "G", "messages": BOTH["messages"]}, None, 2, None),
        (BOTH | {"question": 7}, "messages", 2, None),  # another column that happens to have this name
        (BOTH | {"messages": "12 messages"}, "question", 0, "Q"),
        (ANSWERS, "messages", 0, "Q"),  # told apart later, with the remedy
    ],
)
def test_column_of_the_other_form_is_ignored(tmp_path, row, form, messages, question):
    [found] = scan_rows(write(tmp_path, json.dumps(row)), form=form).rows
    assert (len(found.messages), found.question) == (messages, question)


def test_row_with_both_forms_may_ask_a_question_only(tmp_path):
    [found] = scan_rows(
        write(tmp_path, json.dumps({"question": "Q", "messages": BOTH["messages"]})), True
    ).rows
    assert (found.prompt, found.good) == ("Q", None)


def test_half_of_a_form_that_answer_names_is_refused(tmp_path):
    path = write(tmp_path, json.dumps({"question": "Q", "messages": BOTH["messages"]}))
    with pytest.raises(RowErrors, match=r"the row has no `good`; it has \['messages', 'question'\]"):
        read_rows(path, form="question")


@pytest.mark.parametrize(
    "name", ["rows.jsonl.zst", "rows.jsonl.xz", "rows.csv.gz", "rows.parquet.gz", "rows.zip"]
)
def test_other_compression_is_refused_with_the_fix(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match=r"is compressed in a way.*decompress it, or use \.jsonl\.gz"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(GOOD_LINE.encode() * 50)[:-12], b"\x1f\x8b"])
def test_broken_gzip_file_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read: .*expected a whole gzip file"):
        read_rows(str(tmp_path / "rows.jsonl.gz"))


def test_repeated_id_is_an_error(tmp_path):
    line = json.dumps(ANSWERS | {"id": "a"})
    with pytest.raises(RowErrors, match=r":2: id 'a' is also on line 1"):
        read_rows(write(tmp_path, f"{line}\n{line}\n"))


def test_ten_errors_are_shown_and_all_are_counted(tmp_path):
    with pytest.raises(RowErrors, match=r"^12 bad rows:") as raised:
        read_rows(write(tmp_path, "{}\n" * 12))
    assert len(raised.value.errors) == 12
    assert str(raised.value).count("rows.jsonl:") == 10
    assert "... and 2 more" in str(raised.value)


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_file_without_rows_is_an_error(tmp_path, content):
    with pytest.raises(RowErrors, match="the file has no rows"):
        read_rows(write(tmp_path, content))


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file .*set its `path`"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="a folder"):
        read_rows(str(tmp_path))
