"""What the style asks for and no linter checks."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import lightning_em

REPOSITORY = Path(__file__).parents[1]


def public_classes() -> Iterator[type]:
    for found in pkgutil.walk_packages(lightning_em.__path__, "lightning_em."):
        if found.name.startswith("lightning_em.configs") or found.name.endswith("__main__"):
            continue
        for name, member in vars(importlib.import_module(found.name)).items():
            if inspect.isclass(member) and member.__module__ == found.name and not name.startswith("_"):
                yield member


def own_public_methods(owner: type) -> Iterator[str]:
    for name, member in vars(owner).items():
        written = inspect.isroutine(member) or isinstance(member, property)
        overrides = any(name in vars(base) for base in owner.__mro__[1:])
        if written and not overrides and not name.startswith("_"):
            yield name


def test_every_public_method_says_what_it_does() -> None:
    """A method that overrides another may keep that one's words."""
    classes = list(public_classes())
    assert classes
    silent = [
        f"{owner.__module__}.{owner.__qualname__}.{name}"
        for owner in classes
        for name in own_public_methods(owner)
        if not inspect.getdoc(getattr(owner, name))
    ]
    assert silent == []


def test_code_is_ascii() -> None:
    files = [
        file
        for folder in ("lightning_em", "configs", "tests")
        for file in (REPOSITORY / folder).rglob("*")
        if file.suffix in {".py", ".yaml"}
    ]
    assert files
    assert [str(file) for file in files if not file.read_text(encoding="utf-8").isascii()] == []
