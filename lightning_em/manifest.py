"""Publish folders atomically: temporary sibling, fsync, manifest, rename. Never imports torch."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "MANIFEST.json"
TEMPORARY_PREFIX = ".incomplete-"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(target: Path, write: Callable[[Path], None]) -> Path:
    """Fill a folder and publish it under its name only when it is complete and on disk.

    A valid folder that exists already is kept; an invalid one is renamed first.

    Args:
        target: Folder to create.
        write: Function that fills the folder it is given with plain files, without subfolders.

    Returns:
        `target`.

    Raises:
        OSError: If writing fails; nothing is left under either name.
    """
    if target.exists():
        if not manifest_problems(target):
            return target
        set_aside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(temporary.iterdir())
        listing = {f.name: {"sha256": sha256_of(f), "bytes": f.stat().st_size} for f in files}
        (temporary / MANIFEST).write_text(json.dumps({"files": listing}, indent=2) + "\n", encoding="utf-8")
        for file in [*files, temporary / MANIFEST, temporary]:
            _sync(file)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)
    return target


def set_aside(folder: Path) -> Path:
    """Rename an invalid folder to free its name; its content is kept."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.invalid-{number}")).exists():
        number += 1
    return folder.rename(aside)


def manifest_problems(folder: Path) -> list[str]:
    """List what is wrong with a published folder, one line per file; empty if the folder is valid."""
    manifest = folder / MANIFEST
    try:
        listing = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{manifest}: no readable manifest ({type(error).__name__})"]
    problems = []
    for name, expected in listing.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256_of(file) != expected["sha256"]:
            problems.append(f"{file}: content changed (sha256 differs from {MANIFEST})")
    return problems


def remove_leftovers(parent: Path) -> None:
    """Delete temporary files of killed writers; the caller must make sure that no process is writing."""
    for left in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file atomically; it is on disk when this returns."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
