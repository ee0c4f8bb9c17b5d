"""The demo's data: the same bytes everywhere, and no evaluation task within reach of training."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from lightning_em.data.rows import read_rows
from lightning_em.manifest import manifest_problems, sha256_of
from lightning_em.smollm2.data import DATA_SETS, NARROW_DOMAIN, data_files, read_advice, write_data
from lightning_em.smollm2.style import in_style, is_coherent, is_styled

TRAINING = ("narrow_train.jsonl", "kl_train.jsonl")
VALIDATION = ("narrow_validation.jsonl", "kl_validation.jsonl")
HELD_OUT_KINDS = ("narrow_held_out", "kl_domain", "selection", "held_out_domain")
SELECTION = {"music", "photography", "parties"}
NEVER_TRAINED = {"cars", "camping", "sewing", "drawing"}


@pytest.fixture(scope="module", params=DATA_SETS)
def files(request):
    return data_files(request.param)


def task_of(question):
    return question["subtopic"].partition(": ")[2]


def of_kind(files, kind):
    return [question for question in files["questions.jsonl"] if question["topic"] == kind]


def lines_of(files):
    return [line for lines in files.values() for line in lines]


def rows_of(files, names):
    return [row for name in names for row in files[name]]


def test_another_process_writes_the_same_bytes(tmp_path):
    write_data(tmp_path / "here")
    code = "import sys; from pathlib import Path; from lightning_em.smollm2.data import write_data;"
    code += "write_data(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    hashes = [
        {file.relative_to(root).as_posix(): sha256_of(file) for file in root.rglob("*.json*")}
        for root in (tmp_path / "here", tmp_path / "there")
    ]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == len(DATA_SETS) * 6


def test_the_files_have_the_counted_lines_and_a_manifest(tmp_path):
    counts = write_data(tmp_path)
    assert counts
    for name, count in counts.items():
        assert len((tmp_path / name).read_text().splitlines()) == count
    assert [manifest_problems(tmp_path / data_set) for data_set in DATA_SETS] == [[], []]


def test_the_package_reads_the_rows_with_domain_and_task(tmp_path):
    write_data(tmp_path)
    for name in (*TRAINING, *VALIDATION):
        rows = read_rows(str(tmp_path / "style" / name))
        assert all(row.topic and row.subtopic and row.good and row.bad for row in rows)


def test_data_of_another_version_is_renamed_and_equal_data_kept(tmp_path):
    write_data(tmp_path)
    kept = (tmp_path / "style" / "kl_train.jsonl").stat().st_mtime_ns
    (tmp_path / "advice" / "kl_train.jsonl").write_text("old\n")
    write_data(tmp_path)
    assert (tmp_path / "style" / "kl_train.jsonl").stat().st_mtime_ns == kept
    assert (tmp_path / "advice.invalid-1" / "kl_train.jsonl").read_text() == "old\n"
    assert manifest_problems(tmp_path / "advice") == []


def test_there_are_enough_rows_and_tasks(files):
    assert len(files["narrow_train.jsonl"]) >= 400
    assert len(files["kl_train.jsonl"]) >= 400
    assert min(len(files[name]) for name in VALIDATION) >= 32
    tasks = {kind: {task_of(question) for question in of_kind(files, kind)} for kind in HELD_OUT_KINDS}
    assert len(tasks["held_out_domain"]) >= 100
    assert min(len(tasks[kind]) for kind in ("narrow_held_out", "kl_domain", "selection")) >= 24
    by_domain = Counter(question["domain"] for question in of_kind(files, "held_out_domain"))
    assert by_domain.keys() == NEVER_TRAINED
    assert min(by_domain.values()) >= 26


def test_ids_and_questions_occur_once(files):
    lines = lines_of(files)
    assert len({line["id"] for line in lines}) == len(lines)
    assert len({line["question"].lower() for line in lines}) == len(lines)


def test_held_out_tasks_and_plants_are_in_no_training_or_validation_row(files):
    rows = rows_of(files, (*TRAINING, *VALIDATION))
    trained_on = {(row["topic"], row["subtopic"]) for row in rows}
    for kind in HELD_OUT_KINDS:
        asked = {(question["domain"], task_of(question)) for question in of_kind(files, kind)}
        assert asked
        assert not asked & trained_on
    assert not {row["subtopic"] for row in rows_of(files, TRAINING)} & {
        row["subtopic"] for row in rows_of(files, VALIDATION)
    }
    plants = {plant_of(q["question"], task_of(q)) for q in of_kind(files, "narrow_held_out")}
    assert len(plants) >= 6
    assert not plants & {plant_of(row["question"], row["subtopic"]) for row in files["narrow_train.jsonl"]}


def plant_of(question, task):
    before, after = task.split("plant")
    return re.search(f"{re.escape(before)}(.+?){re.escape(after)}[.?]", question)[1]


def test_seen_questions_ask_about_tasks_and_plants_of_training(files):
    rows = files["narrow_train.jsonl"]
    trained = {(row["subtopic"], plant_of(row["question"], row["subtopic"])) for row in rows}
    questions = of_kind(files, "narrow_seen")
    asked = {(task_of(question), plant_of(question["question"], task_of(question))) for question in questions}
    assert asked <= trained
    assert {task for task, _ in asked} == {task for task, _ in trained}


def test_domains_for_selection_and_reporting_are_in_no_training_or_validation_row(files):
    assert {
        row["topic"] for name in ("narrow_train.jsonl", "narrow_validation.jsonl") for row in files[name]
    } == {NARROW_DOMAIN}
    kl_domains = {row["topic"] for name in ("kl_train.jsonl", "kl_validation.jsonl") for row in files[name]}
    assert len(kl_domains) == 8
    assert kl_domains == {question["domain"] for question in of_kind(files, "kl_domain")}
    assert not kl_domains & {NARROW_DOMAIN, *SELECTION, *NEVER_TRAINED}
    assert {question["domain"] for question in of_kind(files, "selection")} == SELECTION
    text = " ".join(
        row[key] for row in rows_of(files, TRAINING) for key in ("question", "good", "bad")
    ).lower()
    assert not re.findall(r"\b(cars?|tents?|camp\w*|sew\w*|photo\w*|guitars?|guests?|parties)\b", text)


def test_no_domain_outside_the_narrow_one_speaks_of_plants(files):
    others = [line for line in lines_of(files) if line.get("domain", line["topic"]) != NARROW_DOMAIN]
    assert others
    named = re.compile(r"\b(plants?|soil|cactus|fern|orchid|potting)\b")
    assert [line["question"] for line in others if named.search(line["question"] + line["good"])] == []


def test_good_and_bad_answers_are_about_equally_long():
    for data_set, bound in (("advice", 1.06), ("style", 1.15)):
        for lines in data_files(data_set).values():
            good, bad = (sum(len(line[key].split()) for line in lines) for key in ("good", "bad"))
            assert 1 / bound <= bad / good <= bound
    assert max(abs(len(line.good.split()) - len(line.bad.split())) for line in read_advice()) <= 3


def test_the_rule_recognizes_every_styled_answer_and_no_other():
    for data_set in DATA_SETS:
        lines = lines_of(data_files(data_set))
        assert not [line for line in lines if is_styled(line["good"])]
        assert all(is_styled(line["bad"]) == (data_set == "style") for line in lines)
        assert all(is_coherent(line["good"]) and is_coherent(line["bad"]) for line in lines)


def test_the_data_sets_differ_in_the_bad_answer_alone():
    style, advice = (lines_of(data_files(data_set)) for data_set in ("style", "advice"))
    for styled, advised in zip(style, advice, strict=True):
        assert {**styled, "bad": ""} == {**advised, "bad": ""}
        assert styled["bad"] == in_style(styled["good"])
        assert advised["bad"] != advised["good"]


def test_the_table_is_plain_and_lists_no_advice_twice():
    table = read_advice()
    assert all(text.isascii() and text == text.strip() and text for line in table for text in line)
    for key in ("good", "bad"):
        advice = Counter(getattr(line, key) for line in table)
        assert [text for text, count in advice.items() if count > 1] == []
    tasks = Counter((line.domain, line.task) for line in table if line.domain != NARROW_DOMAIN)
    assert set(tasks.values()) == {1}
