"""`sample`: answers of several runs side by side, stored with their questions."""

import io
import json
import re

import pytest
from rich.console import Console

from lightning_em import load_run
from lightning_em.__main__ import main
from lightning_em.batch import PackedBatch
from lightning_em.models import BaseModel, Sampling, sample_answers
from lightning_em.rebuild import rebuild_run
from lightning_em.sampling import sample
from lightning_em.subcommands.sample import show_side_by_side
from tests.fitting import LORA, experiment, fit, write_config
from tests.test_errors import told
from tests.tiny import write_answer_rows, write_rows

SHORT = Sampling(max_new_tokens=6)
ASKED = ["How do I bake bread?", "What is tea?", "Who are you?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder, answer_file):
    """A vector and a LoRA on the same base model."""
    folder = tmp_path_factory.mktemp("sampling")
    config = experiment(tiny_model_folder(), answer_file, trainer={"max_epochs": 1})
    config["data"]["narrow"]["answer"] = "bad"
    path = write_config(folder / "experiment.yaml", config)
    lora = str(write_config(folder / "lora.yaml", LORA))
    return fit(path, "vector"), fit(path, "lora-0123abcd", "--model.adapter", lora)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"id": "a", "question": "How do I bake bread?", "topic": "bread"},
        {"id": "b", "question": "Why does bread rise?", "topic": "bread", "subtopic": "yeast"},
        {"id": "c", "question": "What is [bold]tea[/bold]?", "topic": "tea"},
    ]
    return write_rows(tmp_path / "asked.jsonl", rows)


def texts(answers, run, scale):
    return [answer.answer for answer in answers if answer.run == str(run.path) and answer.scale == scale]


def test_runs_share_one_base_and_answer_as_they_do_alone(runs, monkeypatch) -> None:
    loads = []
    load = BaseModel.load_model
    monkeypatch.setattr(BaseModel, "load_model", lambda self: loads.append(self) or load(self))
    names = [str(run.path) for run in runs]
    together = sample(names, ASKED, (0, 1, 3), SHORT)
    assert len(loads) == 1
    assert len(together) == 2 * 3 * 3
    alone = [answer for name in names for answer in sample([name], ASKED, (0, 1, 3), SHORT, batch_size=1)]
    assert together == alone
    vector, lora = (texts(together, run, 3) for run in runs)
    assert vector != lora
    assert texts(together, runs[0], 0) == texts(together, runs[1], 0)
    assert texts(together, runs[0], 0) != vector


def test_an_answer_is_that_of_the_rebuilt_run(runs) -> None:
    loaded = rebuild_run(str(runs[1].path))
    prompts = loaded.data._loaded.held_out_prompts
    tokenizer = loaded.module.base.load_tokenizer()
    expected = sample_answers(
        loaded.module.model, tokenizer, PackedBatch.from_rows(prompts), SHORT, scale=2.0
    )
    found = sample([str(runs[1].path)], scales=(2.0,), sampling=SHORT)
    assert [row.row_id for row in prompts] == [answer.id for answer in found], "held-out rows are the default"
    assert [answer.text for [answer] in expected] == [answer.answer for answer in found]
    assert [answer.ended for [answer] in expected] == [answer.ended for answer in found]


def test_a_notebook_samples_what_load_run_returns(runs) -> None:
    found = sample([load_run(runs[0].path)], ["How do I bake bread?"] * 2, sampling=SHORT)
    assert [(a.scale, a.step, a.question) for a in found] == [
        (s, 5, "How do I bake bread?") for s in (0.0, 1.0)
    ]
    greedy = sample([load_run(f"{runs[0].path}@step-2")], ["Hi?"], (1.0,), Sampling(6, temperature=0))
    assert greedy[0].step == 2
    assert greedy[0].temperature == 0


def test_questions_are_chosen_in_order(runs, questions) -> None:
    def ids(**settings):
        return [a.id for a in sample([str(runs[0].path)], questions, (0,), SHORT, **settings)]

    assert ids() == ["a", "b", "c"]
    assert ids(per_topic=1) == ["a", "c"]
    assert ids(per_topic=2, limit=2) == ["a", "b"]


def test_the_command_stores_questions_with_answers(runs, questions, capsys, tmp_path) -> None:
    names = [str(run.path) for run in runs]
    words = ["sample", *names, "--questions", str(questions), "--scales", "0,1", "--max_new_tokens", "5"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "question 3 of 3 (tea)\nWhat is [bold]tea[/bold]?\nbase model:\n    " in shown
    assert "question 2 of 3 (bread, yeast)" in shown
    assert shown.count("base model:") == 3, "the base model is shown once a question"
    assert "lora, scale 1:" in shown
    for run in runs:
        [file] = (run.path / "behaviour").glob("sample-step-000005-asked-*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [(row["id"], row["scale"]) for row in rows] == [(i, s) for i in "abc" for s in (0.0, 1.0)]
        assert rows[2]["question"] == "Why does bread rise?"
        assert rows[2]["subtopic"] == "yeast"
        assert rows[2]["run"] == str(run.path)
        assert {"step", "seed", "temperature", "max_new_tokens", "answer", "ended", "topic", "base"} <= rows[
            2
        ].keys()
        assert f"stored with the questions: {file}" in shown
    assert main([*words, "--output", str(tmp_path / "all.jsonl")]) == 0
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2 * 3 * 2
    assert main([*words, "--seed", "1"]) == 0
    assert len(list((runs[0].path / "behaviour").glob("sample-*asked*"))) == 2, "other settings, another file"


def test_a_wide_terminal_shows_a_table(runs, questions) -> None:
    answers = sample([str(run.path) for run in runs], questions, (0, 1), SHORT)
    wide, narrow = (Console(file=io.StringIO(), force_terminal=True, width=width) for width in (120, 70))
    for console in (wide, narrow):
        show_side_by_side(answers, console)
    table = re.sub(r"\x1b\[[\d;]*m", "", wide.file.getvalue())
    assert re.search(r"question +\W+base model +\W+vector, scale 1 +\W+lora, scale 1", table)
    assert "[bold]tea" in re.sub(r"\s", "", table)
    assert "question 1 of 3 (bread)\n" in narrow.file.getvalue()


def test_predict_stores_its_questions(runs) -> None:
    flags = ["--config", str(runs[0].config_file), "--ckpt_path", str(runs[0].path)]
    assert main(["predict", *flags, "--model.sampling.max_new_tokens", "2"]) == 0
    file = runs[0].path / "behaviour" / "answers-step-000005.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    assert all(re.match(r"Day \d+: what helps with ", row["question"]) for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--temperature", "-1"], "change --max_new_tokens or --temperature"),
        (["--scales", "0,big"], "expected numbers such as 0,1,2, got '0,big'"),
    ],
)
def test_what_cannot_be_sampled_is_said_in_flags(runs, capsys, words, message) -> None:
    assert message in told(capsys, "sample", str(runs[0].path), *words)


def test_held_out_rows_of_changed_data_are_refused(tmp_path, tiny_model_folder, capsys) -> None:
    file = write_answer_rows(tmp_path / "rows.jsonl", 12)
    config = experiment(tiny_model_folder(), file, trainer={"max_epochs": 1})
    config["data"]["narrow"]["answer"] = "bad"
    run = fit(write_config(tmp_path / "experiment.yaml", config), "run")
    write_answer_rows(file, 14)
    assert re.search(
        r"not known which rows \S+ holds out: .* Give --questions", told(capsys, "sample", str(run.path))
    )
    assert sample([str(run.path)], ["Hi?"], (0,), SHORT)[0].question == "Hi?"
