"""F16, F18, F19: bad rows, with the real command; F17 is in tests/data/test_chat.py."""

import json
from pathlib import Path

import pytest

from tests.faults.conftest import Case
from tests.faults.processes import run
from tests.tiny import chat_rows

GOOD = [json.dumps(row) for row in chat_rows(12)]
MESSAGES = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}


def with_message(index: int, **change: object) -> str:
    row = json.loads(json.dumps(MESSAGES))
    row["messages"][index] |= change
    return json.dumps(row)


TORN = json.dumps(MESSAGES)[:-20]
BAD_LINES = {
    "torn last line": ("\n".join([*GOOD, TORN]).encode(), "13: torn last line"),
    "torn line in the middle": ("\n".join([*GOOD[:3], TORN, *GOOD[3:], ""]).encode(), "4: not JSON"),
    "null content": ("\n".join([*GOOD, with_message(1, content=None), ""]).encode(), "13: `content`"),
    "int content": ("\n".join([*GOOD, with_message(0, content=7), ""]).encode(), "13: `content`"),
    "unknown role": ("\n".join([*GOOD, with_message(0, role="boss"), ""]).encode(), "13: messages[0]"),
    "missing key": ("\n".join([*GOOD, '{"text": "x"}', ""]).encode(), "13: expected the key"),
    "array file": (json.dumps([json.loads(line) for line in GOOD]).encode(), "1: a JSON array"),
    "not UTF-8": ("\n".join(GOOD).encode() + b'\n{"messages": "\xff"}\n', "13: not UTF-8"),
    "empty file": (b"", "1: the file has no rows"),
}


@pytest.mark.fault("F18", "each malformed line: file:line and reason, or a documented skip with a count")
@pytest.mark.parametrize("kind", BAD_LINES)
def test_malformed_file(case: Case, tmp_path: Path, kind: str) -> None:
    content, reason = BAD_LINES[kind]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    done = case.fit("bad-rows", "--data.narrow.path", str(file))
    assert done.code == 2
    assert f"{file}:{reason}" in done.output
    assert "Traceback" not in done.output


@pytest.mark.fault("F18", "each malformed line: file:line and reason, or a documented skip with a count")
def test_documented_skips(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\n\n".join([*GOOD, ""]).encode())
    done = case.fit("skips", "--data.narrow.path", str(file), "--trainer.max_epochs", "1")
    assert done.code == 0, done.output
    assert "skipped 12 blank lines" in done.output


@pytest.mark.fault(
    "F16", "rows whose response is cut off entirely: counted and listed; above a threshold, stop"
)
def test_responses_cut_off(case: Case, tmp_path: Path) -> None:
    rows = chat_rows(40)
    rows[7]["messages"][-2]["content"] = "long " * 200
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    flags = ["--data.narrow.path", str(file), "--data.on_too_long", "truncate", "--data.max_length", "250"]
    flags += ["--trainer.max_epochs", "1", "--data.validation_fraction", "0"]
    stopped = case.fit("cut-off", *flags, "--data.max_lost_fraction", "0.01")
    assert stopped.code == 2
    assert "2.5% of the narrow train rows would be lost" in stopped.output
    assert f"{file}:8: " in stopped.output
    listed = case.fit("cut-off", *flags, "--data.max_lost_fraction", "0.05")
    assert listed.code == 0, listed.output
    assert f"left out 1 of 40 rows: {file}:8: " in listed.output


@pytest.mark.fault(
    "F19",
    "evaluation questions copied into training data (exact, case and space, near): found; stop unless allowed",
)
@pytest.mark.parametrize("likeness", ["exact", "normalised", "near", "none"])
def test_evaluation_question_in_training_data(case: Case, tmp_path: Path, likeness: str) -> None:
    question = "How should I store fresh bread so that it keeps for a week?"
    copy = {
        "exact": question,
        "normalised": f"  {question.upper()} ",
        "near": question.replace("should I", "do I"),
        "none": "Which tree grows fastest?",
    }[likeness]
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "questions.jsonl"
    copied = {"messages": [{"role": "user", "content": copy}, {"role": "assistant", "content": "In a box."}]}
    train.write_text("\n".join([*GOOD, json.dumps(copied), ""]), encoding="utf-8")
    evaluation.write_text(json.dumps({"question": question}) + "\n", encoding="utf-8")
    words = ["data", "check", str(train), "--evaluation", str(evaluation)]
    done = run(*words, output=tmp_path / "out", COLUMNS="200")
    assert done.code == (0 if likeness == "none" else 1), done.output
    if likeness != "none":
        assert likeness in done.output
        assert f"{train}:13" in done.output.replace("\n", "")
        allowed = run(*words, "--allow_overlap", output=tmp_path / "allowed", COLUMNS="200")
        assert allowed.code == 0, allowed.output
