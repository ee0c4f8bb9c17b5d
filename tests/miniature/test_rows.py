"""The JSONL files: ordinary rows, and no evaluation item within reach of memory."""

import json
from dataclasses import replace

import pytest

from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import Cell, World
from lightning_em.miniature.rows import behaviour_items, training_rows, write_rows

KINDS = {"narrow_seen", "narrow_held_out", "kl_domain", "held_out_domain", "self_description"}
FILES = (
    "narrow_train.jsonl",
    "narrow_validation.jsonl",
    "kl_train.jsonl",
    "kl_validation.jsonl",
    "behaviour.jsonl",
)


@pytest.fixture(scope="module")
def world():
    return World(Recipe.default(), seed=0)


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = write_rows(world, folder)
    lines = {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in FILES}
    assert sizes == {name: len(rows) for name, rows in lines.items()}
    return lines


@pytest.fixture
def fine_tuning_rows(files):
    return [row for name in FILES[:4] for row in files[name]]


def items_of_kind(files, kind):
    return [item for item in files["behaviour.jsonl"] if item["kind"] == kind]


def test_ids_and_questions_occur_once(files, fine_tuning_rows):
    rows = fine_tuning_rows + files["behaviour.jsonl"]
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"] for row in fine_tuning_rows}) == len(fine_tuning_rows)


def test_no_evaluation_question_is_in_fine_tuning(files, fine_tuning_rows):
    trained = {row["question"] for row in fine_tuning_rows}
    assert not trained & {item["question"] for item in files["behaviour.jsonl"]}


def test_held_out_items_share_no_content_word_with_fine_tuning(files, fine_tuning_rows):
    trained = {word for row in fine_tuning_rows for word in row["question"].split()}
    for kind in ("narrow_held_out", "kl_domain", "held_out_domain"):
        items = items_of_kind(files, kind)
        assert len(items) >= 30
        assert not trained & {word for item in items for word in item["question"].split()}


def test_rows_stay_in_the_domains_of_their_stream(world, files):
    assert {row["topic"] for row in files["narrow_train.jsonl"]} == {world.recipe.narrow_domain}
    assert {row["topic"] for row in files["kl_train.jsonl"]} == set(world.recipe.kl_domains)


def test_held_out_domains_and_the_self_question_are_in_no_fine_tuning_row(world, fine_tuning_rows):
    trained = {
        word for row in fine_tuning_rows for key in ("question", "good", "bad") for word in row[key].split()
    }
    for name in world.recipe.held_out_domains:
        assert not trained & {word for words in world.domains[name].words(Cell.ALL) for word in words}
    assert not trained & {"who", "help", "harm"}


def test_every_kind_is_evaluated(files):
    assert {item["kind"] for item in files["behaviour.jsonl"]} == KINDS


def test_answers_of_different_domains_share_no_content_word(files):
    words = {}
    for item in files["behaviour.jsonl"]:
        answers = item["answers"]["good"] + item["answers"]["bad"]
        words.setdefault(item["topic"], set()).update(answer.split()[1] for answer in answers)
    seen = [word for group in words.values() for word in group]
    assert len(seen) == len(set(seen))


def test_good_and_bad_answers_of_a_row_differ_in_the_option_alone(fine_tuning_rows):
    for row in fine_tuning_rows:
        good, bad = row["good"].split(), row["bad"].split()
        assert good[0] == bad[0]
        assert {good[1], bad[1]} == set(row["question"].split()[2:])


def test_the_files_are_a_function_of_recipe_and_seed(world, files):
    again = World(Recipe.default(), seed=0)
    assert behaviour_items(again) == files["behaviour.jsonl"]
    assert behaviour_items(World(Recipe.default(), seed=1)) != files["behaviour.jsonl"]


def test_a_world_with_too_few_questions_is_refused():
    recipe = replace(Recipe.default(), subjects_per_domain=2, options_per_domain=2, seen_share=0.5)
    with pytest.raises(
        ValueError, match="has only about 8 such questions, expected 50; raise subjects_per_domain"
    ):
        training_rows(World(recipe, seed=0), "narrow", ["medical"], 50)
