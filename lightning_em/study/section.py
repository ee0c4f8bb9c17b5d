"""A mapping of a YAML file that knows its place there, so that whatever is wrong names file and key."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml


class Section:
    """One mapping of a file.

    Args:
        file: The file.
        place: Dotted key of the mapping; empty for the whole file.
        content: What is there.

    Raises:
        ValueError: If it is no mapping, or a key is no text (YAML reads `on` and `1` as something else).
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
        """The whole of a YAML file.

        Raises:
            ValueError: If it is not there or no YAML.
        """
        if file.is_dir():
            raise ValueError(
                f"{file} is a folder, expected the file of a study (configs/study/x.yaml); the folder of its runs goes "
                "behind --root."
            )
        try:
            return cls(file, "", yaml.safe_load(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"cannot read {file}: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is no YAML: {error}") from None

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Say what should be under a key.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.file}: {self._place(key)} must be {expected}, got {self.content.get(key)!r}."
        )

    def only(self, known: Iterable[str]) -> None:
        """Let nothing but these keys be here.

        Raises:
            ValueError: If there is another one.
        """
        names = list(known)
        for key in self.content:
            refuse_unknown(key, names, f"{self.file}: {self.place or 'top level'} has a key")

    def section(self, key: str) -> "Section":
        """The mapping under a key; empty if there is none."""
        content = self.content.get(key)
        return Section(self.file, self._place(key), {} if content is None else content)

    def sections(self, key: str) -> dict[str, "Section"]:
        """The mappings of a mapping, by name."""
        inner = self.section(key)
        return {name: inner.section(name) for name in inner.content}

    def text(self, key: str) -> str | None:
        """A string."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def number(self, key: str) -> float | None:
        """A number."""
        value = self.content.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.refuse(key, "a number")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A string or several, never none."""
        value = self.content.get(key)
        values = [value] if isinstance(value, str) else value
        if values is not None and not (
            isinstance(values, list) and values and all(isinstance(value, str) for value in values)
        ):
            self.refuse(key, "a text or a list of texts")
        return values

    def integers(self, key: str) -> list[int] | None:
        """Several whole numbers, each once."""
        values = self.content.get(key)
        if values is not None and not (
            isinstance(values, list)
            and all(type(value) is int for value in values)
            and len(set(values)) == len(values) > 0
        ):
            self.refuse(key, "a list of different whole numbers")
        return values

    def path(self, name: str, key: str, or_folder: bool = False) -> Path:
        """A file named under a key, relative to the study's file.

        Args:
            name: As it is written.
            key: Where it is written.
            or_folder: Whether it may be a folder.

        Raises:
            ValueError: If there is no such file.
        """
        found = (self.file.parent / name).resolve()
        if not (found.exists() if or_folder else found.is_file()):
            what = "file or folder" if or_folder else "file"
            raise ValueError(f"{self.file}: {self._place(key)} names {name}, but there is no {what} {found}.")
        return found

    def _place(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def refuse_unknown(name: str, known: Iterable[str], what: str) -> None:
    """Compare a name with those there are.

    Raises:
        ValueError: If it is none of them; a near one is suggested.
    """
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"{what} {name!r}, expected one of {', '.join(known)}.{hint}")
