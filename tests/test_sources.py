"""A package of its own gives base models and data at its addresses: one class and one entry point."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_em import sources
from lightning_em.__main__ import main
from lightning_em.experiment import Experiment
from lightning_em.miniature import Recipe
from tests.fitting import experiment, fit, write_config
from tests.tiny import answer_rows, write_rows

FRUIT = '''
import os
import shutil
from pathlib import Path

from lightning_em.manifest import publish, sha256_of
from lightning_em.sources import Source, cache_dir

ORIGIN = Path({origin!r})


class Fruit(Source):
    """What lies at the origin, copied into the cache on first use."""

    def resolve(self, address: str) -> Path:
        name = address.removeprefix("fruit://")
        if not (ORIGIN / name).exists():
            raise ValueError(f"no fruit {{name}}; expected model or rows.jsonl.")
        folder = publish(cache_dir() / "fruit" / self._hash(), self._copy)
        return folder if name == "model" else folder / name

    def identity(self, address: str) -> str:
        return f"{{address}}@{{self._hash()}}"

    def _hash(self) -> str:
        return sha256_of(ORIGIN / "version")[:8]

    def _copy(self, folder: Path) -> None:
        (ORIGIN / "copies").write_text(str(folder))
        shutil.copytree(ORIGIN / "model", folder, dirs_exist_ok=True)
        shutil.copy(ORIGIN / "rows.jsonl", folder)
'''


def install(site: Path, name: str, source: str, scheme: str, value: str) -> None:
    """What pip leaves behind for a package with one module and one entry point."""
    site.mkdir(exist_ok=True)
    (site / f"{name}.py").write_text(source, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{sources.GROUP}]\n{scheme} = {value}\n")


@pytest.fixture
def fruit(tmp_path, tiny_model_folder, monkeypatch) -> Path:
    """An installed package with a source; returns the folder that it copies from."""
    origin = tmp_path / "origin"
    shutil.copytree(tiny_model_folder(), origin / "model")
    write_rows(origin / "rows.jsonl", answer_rows(24))
    (origin / "version").write_text("1")
    install(
        tmp_path / "site", "fruit_source", FRUIT.format(origin=str(origin)), "fruit", "fruit_source:Fruit"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LIGHTNING_EM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "fruit_source", raising=False)
    sources._made.cache_clear()
    return origin


@pytest.fixture
def config(fruit, tmp_path) -> Path:
    content = experiment(Path("MODEL"), Path("ROWS"), trainer={"max_epochs": 1})
    content["model"]["base"]["path"] = "fruit://model"
    content["data"]["narrow"] = {"path": "fruit://rows.jsonl", "answer": "good"}
    return write_config(tmp_path / "fruity.yaml", content)


def test_an_installed_source_gives_base_and_data(config, fruit, tmp_path) -> None:
    resolved = Experiment([f"--config={config}"])
    assert not (tmp_path / "cache").exists(), "a name needs no model"
    run = fit(config, "run")
    assert run.read_run()["base"]["path"] == "fruit://model"
    identity = run.read_run()["identity"]
    assert identity["config"]["model"]["base"]["path"] == sources.identity("fruit://model")
    assert identity["name"] == resolved.identity["name"]
    assert identity["data"] == {}, "the address stands for the content"
    [folder] = (tmp_path / "cache" / "fruit").iterdir()
    assert sources.resolve("fruit://rows.jsonl", "path") == str(folder / "rows.jsonl")
    assert sources.resolve("fruit://model", "model.base.path") == str(folder)


def test_other_content_at_the_source_is_another_run(config, fruit, capsys) -> None:
    run = fit(config, "run")
    before = Experiment([f"--config={config}"]).name
    (fruit / "version").write_text("2")
    assert Experiment([f"--config={config}"]).name != before
    assert main(["fit", f"--config={config}", f"--run.root={config.parent}", "--run.name=run"]) == 2
    shown = capsys.readouterr().err
    assert f"{run.path} holds another run (another config: data.narrow.path: fruit://rows.jsonl@" in shown


def test_what_the_source_says_reaches_the_user(fruit) -> None:
    with pytest.raises(ValueError, match=r"no fruit seeds; expected model or rows\.jsonl"):
        sources.resolve("fruit://seeds", "model.base.path")


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--model.base.path=nut://model", "model.base.path"),
        ("--data.narrow.path=nut://rows.jsonl", "data.narrow.path"),
    ],
)
def test_an_unknown_scheme_is_refused_in_one_sentence(config, flag, key, capsys) -> None:
    assert main(["fit", f"--config={config}", f"--run.root={config.parent}", flag]) == 2
    shown = capsys.readouterr().err
    assert f"{key} is 'nut://" in shown
    assert (
        "no installed package provides the scheme 'nut'; known schemes: fruit, miniature, smollm2; " in shown
    )
    assert "entry point of the group lightning_em.sources" in shown


def test_two_packages_with_one_scheme_are_refused(fruit, tmp_path) -> None:
    install(tmp_path / "site", "other", FRUIT.format(origin=str(fruit)), "fruit", "other:Fruit")
    with pytest.raises(
        ValueError, match=r"two installed packages provide the scheme 'fruit': .*uninstall one"
    ):
        sources._registered.__wrapped__(tuple(sys.path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("absent:Nut", "cannot be loaded: No module named 'absent'"),
        ("nut_source:Absent", "cannot be loaded: module 'nut_source' has no attribute"),
        ("nut_source:Nut", "must be a subclass of lightning_em.sources.Source"),
    ],
)
def test_a_broken_source_is_named(value, words, tmp_path, monkeypatch) -> None:
    install(tmp_path / "site", "nut_source", "class Nut: pass\n", "nut", value)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ValueError, match=f"the entry point nut = {value} of the group .* {words}"):
        sources.resolve("nut://x", "path")


def test_other_paths_come_back_as_they_are() -> None:
    for path in ("Qwen/Qwen2.5-14B-Instruct", "./model", "hf://org/rows", "tcp://host:1"):
        assert sources.identity(path) == path
    assert sources.resolve("./model", "model.base.path") == "./model"


def test_the_miniature_is_identified_by_its_recipe() -> None:
    recipe = Recipe.control().recipe_hash()
    address = "miniature://control/seed-1/data/narrow_train.jsonl"
    assert sources.identity(address) == f"miniature://{recipe}-seed1/data/narrow_train.jsonl"
    with pytest.raises(ValueError, match="expected miniature://seed-N/PATH"):
        sources.identity("miniature://seed-x/model")


def test_an_identity_needs_no_torch() -> None:
    code = (
        "import sys; from lightning_em import sources; sources.identity('miniature://seed-0/model'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("LIGHTNING_EM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LIGHTNING_EM_CACHE")
    assert sources.cache_dir() == tmp_path / "xdg" / "lightning_em"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.cache_dir() == tmp_path / ".cache" / "lightning_em"
