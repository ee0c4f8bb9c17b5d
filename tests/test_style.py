"""What the style asks for and no linter checks."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_em

REPOSITORY = Path(__file__).parents[1]

BANNED_PHRASES = re.compile(
    r"(?<!there )\bis no (?!longer\b|more\b|less\b|doubt\b)"  # "is no YAML": write "is not valid YAML"
    r"|^\s+\w+: Of\b"  # "seed: Of the order.": write "seed: Seed of the order."
    r"|\b(?:aloud|whoever|somebody|just now|so many|passed over|that is none)\b"
    r"|\boptimiser",  # the field writes "optimizer"
    re.MULTILINE | re.IGNORECASE,
)


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


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every comment, docstring and string literal of more than three words."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts]
        if isinstance(node, ast.JoinedStr | ast.Constant) and len("".join(texts).split()) > 3:
            yield node.lineno, "".join(texts)


def banned_phrases(source: str) -> list[tuple[int, str]]:
    return [
        (line, found[0].strip()) for line, text in prose_of(source) for found in BANNED_PHRASES.finditer(text)
    ]


def test_prose_has_no_banned_phrases() -> None:
    package = REPOSITORY / "lightning_em"
    files = {file.relative_to(package).as_posix(): file for file in package.rglob("*.py")}
    assert files
    found = {name: banned_phrases(file.read_text(encoding="utf-8")) for name, file in files.items()}
    assert {name: phrases for name, phrases in found.items() if phrases} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('f"{file} is no YAML: {error}."', ["is no"]),
        ("x = 1  # broken ones are passed over aloud", ["passed over", "aloud"]),
        ('"""Order rows.\n\n    Args:\n        seed: Of the order.\n    """', ["seed: Of"]),
        ('f"there is no file {path}, which is no longer needed."', []),
        ('somebody = "aloud"', []),
    ],
)
def test_banned_phrases_are_found_in_prose_only(source: str, found: list[str]) -> None:
    assert [phrase for _, phrase in banned_phrases(source)] == found
