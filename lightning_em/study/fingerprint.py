"""What makes a planned run that run: its words, what the files they name say, recipes of worlds. No torch."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_em.analysis.cells import Plan, run_words
from lightning_em.miniature import SCHEME, parse_address

_BETWEEN_NAMES = re.compile(r"[\n\"'{}\[\],]|: | #")
_texts_read: dict[tuple[Path, int, int], tuple[str, list[str]]] = {}  # runs share most files
_ADDRESS = re.compile(re.escape(SCHEME) + r"[^\s\"'{}\[\],]+")


def plan_of(words: Sequence[str]) -> Plan:
    """What the words of a command line stand for now; data files are left out."""
    texts = _texts_of(words)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return Plan(run_words(words), digest, _recipes_in([*words, *texts.values()]))


def _texts_of(words: Iterable[str]) -> dict[Path, str]:
    """What all YAML files say that words name, and those that these name, by file."""
    texts: dict[Path, str] = {}

    def gather(names: Iterable[str], folder: Path) -> None:
        for name in names:
            file = (folder / name).resolve()
            if file not in texts and file.is_file():
                texts[file], further = _read(file)
                gather(further, file.parent)

    gather(_names_in("\n".join(word.partition("=")[2] for word in words)), Path())
    return texts


def _read(file: Path) -> tuple[str, list[str]]:
    """A file's text and the files it names, read again only if somebody has written it."""
    status = file.stat()
    key = (file, status.st_mtime_ns, status.st_size)
    if key not in _texts_read:
        text = file.read_text(encoding="utf-8")
        _texts_read[key] = text, _names_in(text)
    return _texts_read[key]


def _names_in(text: str) -> list[str]:
    parts = (part.strip("- \t\r") for part in _BETWEEN_NAMES.split(text))
    return [part for part in parts if part.endswith((".yaml", ".yml"))]


def _recipes_in(texts: Iterable[str]) -> tuple[str, ...]:
    addresses = {match for text in texts if SCHEME in text for match in _ADDRESS.findall(text)}
    return tuple(sorted({recipe for address in addresses if (recipe := _recipe_at(address))}))


def _recipe_at(address: str) -> str | None:
    try:
        return parse_address(address)[0].recipe_hash()
    except ValueError:  # in a comment, or the run itself refuses it
        return None
