"""Reading chat rows from JSONL files: every bad line is named, none is guessed at or skipped in silence."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_em.data.chat import Message

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")
_SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Row:
    """One line of a data file: a conversation, or a question with a good and a bad answer.

    Attributes:
        id: The row's own id, or else a hash of its content; unique within the file.
        path: File it was read from.
        line: Line number, from 1.
        messages: The conversation; empty in the question form.
        question: The question; None in the messages form, as are `good` and `bad`.
        good: The good answer.
        bad: The bad answer.
        topic: Topic, where the file gives one.
        subtopic: Subtopic, where the file gives one.
    """

    id: str
    path: str
    line: int
    messages: tuple[Message, ...] = ()
    question: str | None = None
    good: str | None = None
    bad: str | None = None
    topic: str | None = None
    subtopic: str | None = None

    @property
    def prompt(self) -> str:
        """Everything before the first answer: rows that share it ask the same."""
        if self.question is not None:
            return self.question
        roles = [message["role"] for message in self.messages]
        return "\n".join(message["content"] for message in self.messages[: roles.index("assistant")])


class RowError(NamedTuple):
    """What is wrong with one line."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class _UnreadableError(ValueError):
    """A line that is no text or no JSON, as the last line of a file that was cut off is."""


class RowErrors(ValueError):  # noqa: N818 (it holds several)
    """Rows that cannot be used; the message lists the first ten and counts all.

    Attributes:
        errors: All of them, in file order.
    """

    def __init__(self, errors: Sequence[RowError], remedy: str = "") -> None:
        self.errors = tuple(errors)
        lines = [f"{len(errors)} bad row{'s' if len(errors) > 1 else ''}:"]
        lines += [f"  {error}" for error in errors[:_SHOWN_ERRORS]]
        if len(errors) > _SHOWN_ERRORS:
            lines.append(f"  ... and {len(errors) - _SHOWN_ERRORS} more")
        super().__init__("\n".join([*lines, remedy] if remedy else lines))


@dataclass(frozen=True)
class FileScan:
    """Everything found in one file, good or bad.

    Attributes:
        path: The file that was read.
        rows: The usable rows.
        errors: The unusable ones.
        num_blank: Blank lines, which are skipped.
        sha256: Of the file's bytes.
    """

    path: str
    rows: tuple[Row, ...]
    errors: tuple[RowError, ...]
    num_blank: int
    sha256: str

    def usable_rows(self) -> list[Row]:
        """The rows, if all lines are right.

        Raises:
            RowErrors: If any row is bad.
        """
        if self.errors:
            remedy = f"Every line must be right; `lightning-em data check {self.path}` shows more."
            raise RowErrors(self.errors, remedy)
        if self.num_blank:
            logger.warning("%s: skipped %d blank lines", self.path, self.num_blank)
        return list(self.rows)


def read_rows(path: str) -> list[Row]:
    """Read a JSONL file of `{"messages": [...]}` or `{"question", "good", "bad"}` rows.

    `topic`, `subtopic` and `id` are read where present, other keys are left to their owner; blank lines are
    skipped and counted in the log, and so is a byte order mark.

    Raises:
        RowErrors: If any row is bad, with file:line and reason of each.
        ValueError: If there is no such file.
    """
    return scan_rows(path).usable_rows()


def scan_rows(path: str) -> FileScan:
    """Read a JSONL file, keeping its errors beside its rows.

    Raises:
        ValueError: If there is no such file.
    """
    file = _locate(path)
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    ends_cleanly = not lines[-1]
    if ends_cleanly:
        lines.pop()
    rows: list[Row] = []
    errors: list[RowError] = []
    num_blank = 0
    seen: Counter[str] = Counter()
    first_line_of: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            num_blank += 1
            continue
        if number - num_blank == 1 and raw.lstrip().startswith(b"["):
            errors.append(
                RowError(path, number, "a JSON array, expected one object a line; `jq -c '.[]'` converts it")
            )
            break
        try:
            row = _parse_line(raw, path, number, seen)
        except ValueError as error:
            torn = number == len(lines) and not ends_cleanly and isinstance(error, _UnreadableError)
            reason = f"torn last line, the file was cut off: {error}" if torn else str(error)
            errors.append(RowError(path, number, reason))
            continue
        if row.id in first_line_of:
            errors.append(RowError(path, number, f"id {row.id!r} is also on line {first_line_of[row.id]}"))
            continue
        first_line_of[row.id] = number
        rows.append(row)
    if not rows and not errors:
        errors.append(RowError(path, 1, "the file has no rows"))
    return FileScan(path, tuple(rows), tuple(errors), num_blank, sha256)


def _locate(path: str) -> Path:
    resolved = path
    if path.startswith("miniature://"):
        from lightning_em import miniature

        resolved = str(miniature.resolve(path))
    file = Path(resolved).expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{path}: {what} (looked from {Path.cwd()}); expected a JSONL file, set its `path`.")
    return file


def _parse_line(raw: bytes, path: str, line: int, seen: Counter[str]) -> Row:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _UnreadableError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise _UnreadableError(f"not JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError(f"expected an object, got {_kind(data)}")
    has_question = [key for key in ("question", "good", "bad") if key in data]
    if "messages" in data and has_question:
        raise ValueError(f"has both `messages` and `{has_question[0]}`; it must have one form")
    fields: dict[str, Any]
    if "messages" in data:
        fields = {"messages": _messages(data["messages"])}
    elif has_question:
        fields = {key: _text(data, key) for key in ("question", "good", "bad")}
    else:
        raise ValueError(f"expected the key `messages`, or `question`, `good` and `bad`; got {sorted(data)}")
    for key in ("topic", "subtopic"):
        if data.get(key) is not None:
            fields[key] = _text(data, key)
    return Row(id=_row_id(data, fields, seen), path=path, line=line, **fields)


def _row_id(data: dict[str, Any], fields: dict[str, Any], seen: Counter[str]) -> str:
    """The row's own id, or a hash of its content with the occurrence behind it for exact copies."""
    given = data.get("id")
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
            raise ValueError(f"`id` must be a string or a whole number, got {given!r}")
        return str(given)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    seen[digest] += 1
    return digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`messages` must be a list of turns, got {_kind(value)}")
    messages = tuple(_message(item, f"messages[{index}]") for index, item in enumerate(value))
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("a system message must come first")
    if roles[roles[0] == "system" :][:1] != ["user"]:
        raise ValueError(f"the first turn must be the user's, got the roles {roles}")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message must be the assistant's, got the roles {roles}")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_kind(value)}")
    for key in ("role", "content"):
        if key not in value:
            raise ValueError(f"{where} has no `{key}`; it has {sorted(value)}")
    if surplus := sorted(value.keys() - {"role", "content"}):
        raise ValueError(f"{where} has {surplus}, which would be ignored; a message is `role` and `content`")
    if value["role"] not in _ROLES:
        raise ValueError(f"{where} has the unknown role {value['role']!r}; expected one of {list(_ROLES)}")
    # An empty system message is how one asks for no system prompt where the template has a default one.
    return {
        "role": value["role"],
        "content": _text(value, "content", where, may_be_empty=value["role"] == "system"),
    }


def _text(data: dict[str, Any], key: str, where: str = "the row", may_be_empty: bool = False) -> str:
    if key not in data:
        raise ValueError(f"{where} has no `{key}`; it has {sorted(data)}")
    value = data[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` of {where} must be text, got {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"`{key}` of {where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{key}` of {where} has half of a surrogate pair, which is no text") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} occurs twice in one object")
    return data


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return f"{type(value).__name__} {json.dumps(value)[:40]}"
