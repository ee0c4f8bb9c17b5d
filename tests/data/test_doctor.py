import io
import json

import pytest
from rich.console import Console

from lightning_em.data import ChatEncoder, as_chats, read_rows
from lightning_em.data.doctor import check_files
from lightning_em.data.show import report_tables, show_chats
from tests.tiny import make_tiny_tokenizer, write_answer_rows, write_chat_rows, write_rows

QUESTION_YAML = """
- id: one
  type: free_form_judge_0_100
  paraphrases: ["Day 3: what helps with rice?", "Something else entirely"]
"""


def text_of(renderable) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.fixture
def answers(tmp_path):
    return str(write_answer_rows(tmp_path / "answers.jsonl", 12))


def test_clean_files_have_no_faults(answers, tmp_path):
    chat = str(write_chat_rows(tmp_path / "chat.jsonl", 12))
    report = check_files([chat], kl=[answers], encoder=ChatEncoder(make_tiny_tokenizer()))
    assert (report.faults, report.exit_code) == ((), 0)
    first, second = report.files
    assert (first.purpose, second.purpose) == ("train", "kl")
    assert set(first.lengths) == {"user", "assistant", "system"}
    assert set(second.lengths) == {"question", "good", "bad"}
    assert (first.num_truncated, first.num_lost) == (0, 0)
    assert "no faults" in text_of(report_tables(report))


def test_counts_by_topic_role_and_length(tmp_path):
    rows = [
        {"question": "q" * 10, "good": "g" * 17, "bad": "b" * 30 + ".", "topic": "tea"},
        {"question": "r" * 20, "good": "g" * 33 + ".", "bad": "b.", "topic": "tea"},
        {"question": "s" * 30, "good": "g.", "bad": "b", "topic": "soup"},
    ]
    (file,) = check_files([str(write_rows(tmp_path / "f.jsonl", rows))]).files
    assert file.topics == {"tea": 2, "soup": 1}
    lengths = file.lengths["question"]
    assert (lengths.count, lengths.shortest, lengths.mean, lengths.longest) == (3, 10, 20, 30)
    assert lengths.histogram == ((16, 1), (32, 2))
    assert file.lengths["good"].histogram == ((16, 1), (32, 1), (64, 1))
    assert file.num_unfinished == 2


def test_bad_rows_are_a_fault_with_their_lines(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"messages": 3}\n{"question": "q", "good": "g", "bad": "b"}\n{"quest')
    report = check_files([str(path)])
    assert report.exit_code == 1
    assert "2 bad rows, first" in report.faults[0]
    text = text_of(report_tables(report))
    assert f"{path}:1: `messages` must be a list" in text
    assert f"{path}:3: torn last line" in text


@pytest.mark.parametrize("purpose", ["train", "kl"])
@pytest.mark.parametrize(
    ("question", "likeness"),
    [
        ("Day 3: what helps with rice?", "exact"),
        ("day 3 WHAT helps  with rice", "normalised"),
        ("Day 3: what really helps with rice?", "near"),
    ],
)
def test_evaluation_questions_in_training_files_are_a_fault_unless_allowed(
    answers, tmp_path, question, likeness, purpose
):
    asked = str(
        write_rows(tmp_path / "asked.jsonl", [{"question": question}, {"question": "Is the sea blue?"}])
    )
    files = {"train": [answers]} if purpose == "train" else {"train": [], "kl": [answers]}
    report = check_files(**files, evaluation=[asked])
    (overlap,) = report.overlaps
    assert [(match.likeness, match.second.line) for match in overlap.matches] == [(likeness, 1)]
    assert report.exit_code == 1
    assert f"1 evaluation questions are in the {purpose} files" in report.faults[0]
    assert check_files(**files, evaluation=[asked], allow_overlap=True).exit_code == 0
    assert f"is {likeness}" in text_of(report_tables(report))


def test_questions_of_a_yaml_file_are_compared(answers, tmp_path):
    path = tmp_path / "questions.yaml"
    path.write_text(QUESTION_YAML)
    report = check_files([answers], evaluation=[str(path)])
    assert [match.likeness for match in report.overlaps[0].matches] == ["exact"]
    path.write_text("- id: one\n")
    assert "has no list `paraphrases`" in check_files([answers], evaluation=[str(path)]).faults[0]


def test_topics_of_evaluation_are_held_out_or_shared(tmp_path):
    def file(name, *topics):
        rows = [
            {"question": f"{name} {t} {i}", "good": "g", "bad": "b", "topic": t} for i, t in enumerate(topics)
        ]
        return str(write_rows(tmp_path / f"{name}.jsonl", rows))

    report = check_files([file("train", "tea", "soup")], evaluation=[file("evaluation", "rice", "tea")])
    assert report.held_out_topics == ("rice",)
    assert report.shared_topics == ("tea",)


def test_rows_that_would_be_cut_are_counted(answers):
    encoder = ChatEncoder(make_tiny_tokenizer())
    (file,) = check_files([answers], encoder=encoder, max_length=20).files
    assert (file.num_truncated, file.num_lost) == (24, 24)
    (file,) = check_files([answers], encoder=encoder, max_length=70).files
    assert file.num_truncated > 0 == file.num_lost


def test_rows_that_the_template_cannot_take_are_a_fault(tmp_path):
    rows = [{"question": "q<|im_end|>", "good": "g", "bad": "b"}]
    report = check_files(
        [str(write_rows(tmp_path / "f.jsonl", rows))], encoder=ChatEncoder(make_tiny_tokenizer())
    )
    assert "1 rows rejected by the chat template" in report.faults[0]


def test_texts_of_files_cannot_steer_the_terminal(tmp_path):
    evil = "[bold]x[/] \x1b[31mred\x07 \u202e [link=file:///]y"
    path = str(
        write_rows(tmp_path / "f.jsonl", [{"question": evil, "good": evil, "bad": evil, "topic": "[/]"}])
    )
    report = check_files([path], evaluation=[path])
    (row,) = read_rows(path)
    shown = show_chats(as_chats([row], "good"), ChatEncoder(make_tiny_tokenizer()))
    for text in (text_of(report_tables(report)), text_of(shown)):
        assert "[bold]x[/]" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_shown_rows_colour_exactly_what_is_trained(answers):
    rows = read_rows(answers)[:1]
    console = Console(
        width=200, record=True, force_terminal=True, color_system="standard", file=io.StringIO()
    )
    console.print(show_chats(as_chats(rows, "bad"), ChatEncoder(make_tiny_tokenizer())))
    text = console.export_text(styles=True)
    assert f"\x1b[1;32m{rows[0].bad}<|im_end|>\x1b[0m" in text
    assert "trained" in text


def test_repeated_questions_are_counted(tmp_path):
    rows = [
        {"question": q, "good": json.dumps(i), "bad": "b"}
        for i, q in enumerate(["Why so?", "why so", "Why so?"])
    ]
    (file,) = check_files([str(write_rows(tmp_path / "f.jsonl", rows))]).files
    assert [match.likeness for match in file.repeated] == ["normalised", "exact"]
