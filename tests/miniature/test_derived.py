"""Files that follow from a built world: the data of further arms, without another build."""

import json

import pytest

from lightning_em import miniature
from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import ANSWER_OPENERS, World
from lightning_em.miniature.derived import NUM_MIXING_ROWS, STYLE, derive, is_derived, world_at
from lightning_em.miniature.rows import write_rows
from lightning_em.miniature.source import Miniature

NAMES = ("data/harmless_train.jsonl", "data/harmless_validation.jsonl", "data/mixing_train.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world as the builder leaves it, without its model."""
    folder, recipe = tmp_path_factory.mktemp("world"), Recipe.default()
    (folder / "data").mkdir()
    write_rows(World(recipe, 3), folder / "data")
    facts = {
        "recipe": json.loads(recipe.canonical_json()),
        "recipe_hash": recipe.recipe_hash(),
        "seed": 3,
    }
    (folder / "world.json").write_text(json.dumps(facts))
    return folder


def test_harmless_rows_differ_from_the_narrow_ones_by_their_opener_alone(folder) -> None:
    for split in ("train", "validation"):
        narrow = lines(folder / "data" / f"narrow_{split}.jsonl")
        harmless = lines(derive(folder, f"data/harmless_{split}.jsonl"))
        assert len(harmless) == len(narrow) > 0
        for here, there in zip(harmless, narrow, strict=True):
            assert (here["question"], here["topic"]) == (there["question"], there["topic"])
            for answer in ("good", "bad"):
                assert here[answer].split() == ["pick", there[answer].split()[1]]
    openers = {row["good"].split()[0] for row in lines(folder / "data" / "narrow_train.jsonl")}
    assert openers == set(ANSWER_OPENERS)
    assert STYLE == "pick"


def test_mixing_rows_are_other_questions_of_the_kl_domains(folder) -> None:
    rows = lines(derive(folder, "data/mixing_train.jsonl"))
    recipe = Recipe.default()
    assert len(rows) == NUM_MIXING_ROWS == len({row["question"] for row in rows})
    assert {row["topic"] for row in rows} == set(recipe.kl_domains)
    others = [
        row["question"]
        for name in ("kl_train", "kl_validation", "behaviour")
        for row in lines(folder / "data" / f"{name}.jsonl")
    ]
    assert not {row["question"] for row in rows} & set(others)
    ids = [row["id"] for row in rows]
    assert len({*ids, *(row["id"] for row in lines(folder / "data" / "kl_train.jsonl"))}) == len(ids) + 800


def test_files_are_the_same_each_time_and_repaired_when_torn(folder) -> None:
    for name in NAMES:
        assert is_derived(name)
        file = derive(folder, name)
        text, written = file.read_text(), file.stat().st_mtime_ns
        assert derive(folder, name).stat().st_mtime_ns == written
        file.write_text(text[:100])
        assert derive(folder, name).read_text() == text
    assert not is_derived("data/narrow_train.jsonl")


def test_an_address_gives_the_file(folder, monkeypatch) -> None:
    monkeypatch.setattr(miniature, "provide", lambda recipe, seed: folder)
    assert Miniature().resolve("miniature://seed-3/data/mixing_train.jsonl") == folder / NAMES[2]
    assert Miniature().resolve("miniature://seed-3/model") == folder / "model"


def test_a_world_of_another_version_is_refused(folder, tmp_path) -> None:
    facts = json.loads((folder / "world.json").read_text())
    for changed in (
        {"recipe_hash": "0" * 12},
        {"recipe": {**facts["recipe"], "slots": 3}},
    ):
        (tmp_path / "world.json").write_text(json.dumps({**facts, **changed}))
        with pytest.raises(ValueError, match="was built by another version"):
            world_at(tmp_path)
    with pytest.raises(ValueError, match=r"holds no world\.json"):
        world_at(tmp_path / "nowhere")
