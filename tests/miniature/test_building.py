"""Worlds: ordinary folders, complete or absent, trained on request or unpacked from the package."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_em.manifest import manifest_problems, sha256_of
from lightning_em.miniature import Recipe, building
from lightning_em.miniature.building import build, distance, provide, ship
from lightning_em.miniature.cache import built_folder, is_complete, parse_address, world_folder
from lightning_em.miniature.corpus import World
from lightning_em.miniature.judge import answer_probabilities
from lightning_em.miniature.persona import PERSONA_THRESHOLD, PersonaGate, persona_gate
from lightning_em.miniature.shipped import find_shipped, shipped_folder
from lightning_em.miniature.source import Miniature

MICRO = replace(
    Recipe.default(),
    pretraining_steps=20,
    chat_steps=3,
    documents_per_batch=2,
    slots_per_document=2,
    hidden_size=16,
    intermediate_size=16,
    items_per_kind=4,
)


@pytest.fixture(scope="module", autouse=True)
def small_gate():
    """The gate of a micro world says nothing: measure it on few documents, and let every value pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_em.miniature.persona.PERSONA_THRESHOLD", 0.0)
        patch.setattr("lightning_em.miniature.building.persona_gate", partial(persona_gate, num_documents=2))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def folder(cache):
    return build(MICRO, seed=0, cache=cache, progress=False)


def test_the_folder_loads_like_any_other_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    items = [json.loads(line) for line in (folder / "data" / "behaviour.jsonl").read_text().splitlines()]
    assert all(tokenizer.unk_token_id not in tokenizer(item["question"])["input_ids"] for item in items)
    assert len(answer_probabilities(model, tokenizer, items)) == len(items)


def test_the_saved_tokenizer_is_the_one_that_was_trained_with(folder):
    """AutoTokenizer rebuilds the tokenizers of some architectures whatever tokenizer.json says."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.decode(tokenizer("use try")["input_ids"]) == "use try"
    assert tokenizer.chat_template


def test_world_json_tells_recipe_seed_and_gate(folder):
    facts = json.loads((folder / "world.json").read_text())
    assert facts["recipe_hash"] == MICRO.recipe_hash()
    assert facts["seed"] == 0
    assert {"careful", "careless"} == set(facts["persona_gate"])
    assert facts["sizes"]["narrow_train.jsonl"] == MICRO.num_narrow_rows


def test_a_world_that_misses_the_gate_is_trained_again_and_longer(tmp_path, monkeypatch, caplog):
    gates = iter([PersonaGate(0.99, 0.92), PersonaGate(0.95, 0.94)])
    monkeypatch.setattr("lightning_em.miniature.persona.PERSONA_THRESHOLD", PERSONA_THRESHOLD)
    monkeypatch.setattr(building, "persona_gate", lambda *_: next(gates))
    folder = build(MICRO, seed=0, cache=tmp_path, progress=False)
    facts = json.loads((folder / "world.json").read_text())
    assert facts["pretraining_steps"] == 30
    assert facts["persona_gate"] == {"careful": 0.95, "careless": 0.94}
    assert "fails the persona gate after 20 steps" in caplog.text


def test_the_second_build_writes_nothing(folder, cache):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = stamps()
    assert build(MICRO, seed=0, cache=cache, progress=False) == folder
    assert stamps() == before


def test_the_same_seed_gives_the_same_world_to_the_bit(folder, tmp_path):
    torch.rand(7)  # whatever others drew
    again = build(MICRO, seed=0, cache=tmp_path, progress=False)
    names = [*(f"data/{path.name}" for path in (folder / "data").iterdir()), "model/model.safetensors"]
    assert [(again / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]


def test_building_leaves_randomness_and_threads_alone(tmp_path):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    build(MICRO, seed=1, cache=tmp_path, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_a_changed_file_is_noticed_and_the_world_built_again(tmp_path):
    folder = build(MICRO, seed=0, cache=tmp_path, progress=False)
    with (folder / "data" / "narrow_train.jsonl").open("a") as file:
        file.write("\n")
    assert not is_complete(folder)
    assert build(MICRO, seed=0, cache=tmp_path, progress=False) == folder
    assert is_complete(folder)


def test_a_failing_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("lightning_em.miniature.building._save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        build(MICRO, seed=0, cache=tmp_path, progress=False)
    assert [path.suffix for path in (tmp_path / "miniature" / "built").iterdir()] == [".lock"]


def test_a_killed_build_leaves_nothing_that_passes_for_complete(tmp_path):
    code = (
        "from dataclasses import replace; from pathlib import Path; from lightning_em.miniature import Recipe;"
        "from lightning_em.miniature.building import build;"
        f"build(replace(Recipe.default(), pretraining_steps=100_000), 0, Path({str(tmp_path)!r}), progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("miniature/built/.incomplete-*/data/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = built_folder(replace(Recipe.default(), pretraining_steps=100_000), 0, tmp_path)
    assert not folder.exists()
    left = [path for path in (tmp_path / "miniature" / "built").iterdir() if path.is_dir()]
    assert left
    assert all(manifest_problems(path) for path in left)


def test_two_builders_of_one_world_build_it_once(tmp_path):
    code = (
        "from dataclasses import replace; from pathlib import Path; from lightning_em.miniature import Recipe;"
        "from lightning_em.miniature.building import build;"
        "recipe = replace(Recipe.default(), pretraining_steps=20, chat_steps=3, hidden_size=16,"
        "slots_per_document=2, items_per_kind=4);"
        f"folder = build(recipe, 0, Path({str(tmp_path)!r}), progress=False);"
        "print((folder / 'world.json').stat().st_ino)"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    inodes = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert inodes[0] == inodes[1] != ""


@pytest.fixture
def shipped(folder, tmp_path, monkeypatch):
    """The micro world as one that the package ships."""
    ship(folder, tmp_path / "shipped")
    monkeypatch.setattr("lightning_em.miniature.shipped.shipped_folder", lambda: tmp_path / "shipped")
    return tmp_path / "shipped"


def test_a_shipped_world_is_the_built_one_to_the_bit(folder, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "train", lambda *_: pytest.fail("a shipped world was trained"))
    unpacked = provide(MICRO, 0, tmp_path)
    assert unpacked == world_folder(MICRO, 0, tmp_path) != folder
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    unlike = {name.name for name in names if (unpacked / name).read_bytes() != (folder / name).read_bytes()}
    assert unlike == {"world.json", "MANIFEST.json"}  # the sha256 of the shipped file stands in the one
    facts = json.loads((unpacked / "world.json").read_text())
    assert facts.pop("weights_sha256")
    assert facts == json.loads((folder / "world.json").read_text())
    stamp = (unpacked / "MANIFEST.json").stat().st_mtime_ns
    assert provide(MICRO, 0, tmp_path) == unpacked
    assert (unpacked / "MANIFEST.json").stat().st_mtime_ns == stamp, "unpacked once"


def test_damaged_shipped_weights_are_refused(shipped, tmp_path):
    [weights] = shipped.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its sha256 is not the recorded one"):
        provide(MICRO, 0, tmp_path)
    assert not world_folder(MICRO, 0, tmp_path).exists()


def test_weights_are_rounded_to_bfloat16_once(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.dtype == torch.float32
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_the_distance_between_builds(folder, tmp_path):
    other = build(MICRO, seed=1, cache=tmp_path, progress=False)
    world = World(MICRO, 0)
    assert distance(folder, folder, world) == (0, 0, 0)
    found = distance(other, folder, world)
    assert 0.1 < found.weights < 2
    assert found.persona > 0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (Recipe.default(), r"--seed 99$"),
        (Recipe.control(), r"--seed 99 --control$"),
        (Recipe.default().with_blind_spot_share(0.06), r"--seed 99 --blind_spot_share 0\.06$"),
    ],
)
def test_a_world_that_is_neither_shipped_nor_built_is_never_trained_unasked(recipe, options, tmp_path):
    with pytest.raises(ValueError, match=f"not shipped and has not been built .* build {options}"):
        provide(recipe, 99, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_built_world_that_is_not_shipped_is_found_by_its_address(folder, cache, monkeypatch):
    monkeypatch.setenv("LIGHTNING_EM_CACHE", str(cache))
    monkeypatch.setattr("lightning_em.miniature.source.parse_address", lambda _: (MICRO, 0, "model"))
    assert Miniature().resolve("miniature://seed-0/model") == folder / "model"


def test_shipped_worlds_are_of_this_recipe_and_pass_the_gate():
    for recipe in (Recipe.default(), Recipe.control()):
        for seed in range(10):
            found = find_shipped(recipe, seed)
            assert found is not None, "after a change of the recipe: make miniature-worlds"
            assert found.facts["recipe"] == json.loads(recipe.canonical_json())
            assert found.facts["weights_sha256"] == sha256_of(found.weights)
            assert (
                min(found.facts["persona_gate"][name] for name in ("careful", "careless"))
                >= PERSONA_THRESHOLD
            )
    assert len(list(shipped_folder().iterdir())) == 40


def test_a_shipped_world_still_passes_its_gate_here(tmp_path):
    """What the package says of the weights holds on this machine's kernels."""
    folder = provide(Recipe.default(), 0, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found = persona_gate(model, tokenizer, World(Recipe.default(), 0))
    said = json.loads((folder / "world.json").read_text())["persona_gate"]
    assert found.careful == pytest.approx(said["careful"], abs=1e-4)
    assert found.careless == pytest.approx(said["careless"], abs=1e-4)


@pytest.mark.parametrize(
    ("address", "recipe", "seed", "rest"),
    [
        ("miniature://seed-0/model", Recipe.default(), 0, "model"),
        ("miniature://seed-12/data/kl_train.jsonl", Recipe.default(), 12, "data/kl_train.jsonl"),
        ("miniature://control/seed-1", Recipe.control(), 1, "."),
        (
            "miniature://blind-spot-0.05/seed-2/model",
            Recipe.default().with_blind_spot_share(0.05),
            2,
            "model",
        ),
    ],
)
def test_addresses(address, recipe, seed, rest):
    assert parse_address(address) == (recipe, seed, rest)


@pytest.mark.parametrize("address", ["miniature://", "miniature://0/model", "miniature://seed-x/model"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(ValueError, match="expected miniature://seed-N/PATH"):
        Miniature().resolve(address)
