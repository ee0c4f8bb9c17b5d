"""Folders appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from lightning_em.manifest import (
    MANIFEST,
    TEMPORARY_PREFIX,
    manifest_problems,
    publish,
    remove_leftovers,
    write_atomically,
)


def write_two(folder: Path) -> None:
    (folder / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"two")


def test_a_published_folder_is_whole(tmp_path) -> None:
    folder = publish(tmp_path / "x", write_two)
    assert {file.name for file in folder.iterdir()} == {"a", "b", MANIFEST}
    assert manifest_problems(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a").write_bytes(b"onf"), "content changed"),
        (lambda folder: (folder / "a").write_bytes(b"on"), "2 bytes instead of 3"),
        (lambda folder: (folder / "a").unlink(), "missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "no readable manifest"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "no readable manifest"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "no readable manifest"),
    ],
)
def test_damage_is_found_and_a_valid_folder_replaces_it(tmp_path, damage, message) -> None:
    folder = publish(tmp_path / "x", write_two)
    damage(folder)
    [problem] = manifest_problems(folder)
    assert message in problem
    publish(folder, write_two)
    assert manifest_problems(folder) == []
    assert (tmp_path / "x.invalid-1").is_dir()


def test_a_valid_folder_is_kept(tmp_path) -> None:
    folder = publish(tmp_path / "x", write_two)
    publish(folder, lambda _: pytest.fail("it is there already"))


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    def full(folder: Path) -> None:
        (folder / "a").write_bytes(b"one")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "x", full)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path) -> None:
    publish(tmp_path / "x", write_two)
    (tmp_path / f"{TEMPORARY_PREFIX}y-1").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}y-1" / "a").touch()
    (tmp_path / f"{TEMPORARY_PREFIX}run.json-1").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_text_file_is_replaced_in_one_step(tmp_path) -> None:
    write_atomically(tmp_path / "run.json", "1")
    write_atomically(tmp_path / "run.json", "2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("run.json", "2")]
