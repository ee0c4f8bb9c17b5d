"""Mappings of a YAML file that know their file and key, so that error messages can name both."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lightning_em.config_args import load_yaml


class Section:
    """One mapping of a YAML file.

    Args:
        file: File that holds the mapping.
        place: Dotted key of the mapping; empty for the whole file.
        content: Parsed value under that key.

    Raises:
        ValueError: If `content` is not a mapping, or a key is not a string (YAML reads `on` as a truth value and `1`
            as a number).
    """

    def __init__(self, file: Path, place: str, content: Any) -> None:
        self.file, self.place = file, place
        if not isinstance(content, Mapping):
            raise ValueError(f"{file}: {place or 'the file'} must be a mapping, got {content!r}.")
        for key in content:
            if not isinstance(key, str):
                raise ValueError(
                    f"{file}: {place or 'top level'} has the key {key!r}, no text: put it in quotes."
                )
        self.content = dict(content)

    @classmethod
    def read(cls, file: Path) -> "Section":
        """Read a whole YAML file.

        Raises:
            ValueError: If the file cannot be read, is not valid YAML, or has a key twice.
        """
        if file.is_dir():
            raise ValueError(
                f"{file} is a folder, expected the file of a study (configs/study/x.yaml); the folder of its runs goes "
                "behind --root."
            )
        try:
            return cls(file, "", load_yaml(file.read_text(encoding="utf-8"), file))
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from None

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise an error that says what a key must hold.

        Args:
            key: Key in this mapping.
            expected: Description of the value that is expected.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.file}: {self._place(key)} must be {expected}, got {self.content.get(key)!r}."
        )

    def only(self, known: Iterable[str]) -> None:
        """Check that the mapping has no other keys than these.

        Raises:
            ValueError: If it has another key.
        """
        names = list(known)
        for key in self.content:
            refuse_unknown(key, names, f"{self.file}: {self.place or 'top level'} has a key")

    def section(self, key: str) -> "Section":
        """The mapping under a key; empty if the key is missing or null."""
        content = self.content.get(key)
        return Section(self.file, self._place(key), {} if content is None else content)

    def sections(self, key: str) -> dict[str, "Section"]:
        """The mappings in the mapping under a key, by name."""
        inner = self.section(key)
        return {name: inner.section(name) for name in inner.content}

    def text(self, key: str) -> str | None:
        """The string under a key; None if the key is missing or null."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def number(self, key: str) -> float | None:
        """The number under a key; None if the key is missing or null."""
        value = self.content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(key, "a number")
        return value

    def texts(self, key: str) -> list[str] | None:
        """The strings under a key, written as one string or as a list that is not empty; None if missing or null."""
        value = self.content.get(key)
        values = [value] if isinstance(value, str) else value
        if values is not None and not (
            isinstance(values, list) and values and all(isinstance(value, str) for value in values)
        ):
            self.refuse(key, "a text or a list of texts")
        return values

    def integers(self, key: str) -> list[int] | None:
        """The different integers under a key, at least one; None if missing or null."""
        values = self.content.get(key)
        if values is not None and not (
            isinstance(values, list)
            and all(type(value) is int for value in values)
            and len(set(values)) == len(values) > 0
        ):
            self.refuse(key, "a list of different whole numbers")
        return values

    def path(self, name: str, key: str, or_folder: bool = False) -> Path:
        """Resolve a path that a key names, relative to the study file.

        Args:
            name: Path as written in the file.
            key: Key that names the path.
            or_folder: Whether a folder is accepted as well.

        Returns:
            The absolute path.

        Raises:
            ValueError: If the path does not exist.
        """
        found = (self.file.parent / name).resolve()
        if not (found.exists() if or_folder else found.is_file()):
            what = "file or folder" if or_folder else "file"
            raise ValueError(f"{self.file}: {self._place(key)} names {name}, but there is no {what} {found}.")
        return found

    def _place(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def refuse_unknown(name: str, known: Iterable[str], what: str) -> None:
    """Check that a name is one of the known ones.

    Args:
        name: Name to check.
        known: Valid names.
        what: Beginning of the message, which the name follows.

    Raises:
        ValueError: If the name is not known; the message suggests a similar one.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what} {name!r}, expected one of {', '.join(known)}.{hint}")
