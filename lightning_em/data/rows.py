"""Read chat rows from files. Every bad row is reported; no row is repaired or skipped silently."""

import gzip
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning_em import sources
from lightning_em.data.checks import Form, given_id, row_fields, unique_keys
from lightning_em.data.tables import HUB_SCHEME, is_saved_folder, is_table, read_table
from lightning_em.data.template import Message

logger = logging.getLogger(__name__)

_SHOWN_ERRORS = 10
_COMPRESSED = (".bz2", ".xz", ".zip", ".zst", ".csv.gz", ".parquet.gz", ".tar.gz")


@dataclass(frozen=True)
class Row:
    """One row of a data file: a conversation, a question with a good and a bad answer, or both.

    Attributes:
        id: The row's own id, or a hash of its content; unique within the file.
        path: File that the row was read from.
        line: Line number, from 1; the index of the row in formats without lines.
        messages: Conversation; empty if the row has none.
        question: Question; None if the row has none, as are `good` and `bad`.
        good: Good answer.
        bad: Bad answer.
        topic: Topic, if the file gives one.
        subtopic: Subtopic, if the file gives one.
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
        """Everything before the first answer; rows with the same prompt ask the same question."""
        if self.question is not None:
            return self.question
        roles = [message["role"] for message in self.messages]
        return "\n".join(message["content"] for message in self.messages[: roles.index("assistant")])


class RowError(NamedTuple):
    """One line that cannot be used, with the reason."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class _UnreadableError(ValueError):
    """A line that is not text or not JSON, such as the last line of a truncated file."""


class RowErrors(ValueError):  # noqa: N818 (it holds several)
    """Rows that cannot be used; the message lists the first ten and the total number.

    Attributes:
        errors: All errors, in file order.
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
    """Contents of one file: usable rows and errors.

    Attributes:
        path: File that was read.
        rows: Usable rows.
        errors: Unusable rows.
        num_blank: Number of blank lines, which are skipped.
        sha256: Hash of the bytes of the file, or of all files of the data set.
        revision: Commit of a data set on the hub; None for files.
    """

    path: str
    rows: tuple[Row, ...]
    errors: tuple[RowError, ...]
    num_blank: int
    sha256: str
    revision: str | None = None

    def usable_rows(self) -> list[Row]:
        """Return the rows if there are no errors.

        Raises:
            RowErrors: If any row is bad.
        """
        if self.errors:
            remedy = f"Every line must be valid; `lightning-em data check {self.path}` shows more."
            raise RowErrors(self.errors, remedy)
        if self.num_blank:
            logger.warning("%s: skipped %d blank lines", self.path, self.num_blank)
        return list(self.rows)


def read_rows(path: str, key: str = "path", form: Form | None = None) -> list[Row]:
    """Read `{"messages": [...]}` or `{"question", "good", "bad"}` rows from any file that `scan_rows` accepts.

    `topic`, `subtopic` and `id` are read if present; other keys are ignored. Blank lines are skipped and their
    number is logged. A byte order mark is skipped too.

    Args:
        path: File, as in `scan_rows`.
        key: Config key that holds the path, for messages.
        form: Form to read from rows that have both, as in `scan_rows`.

    Raises:
        RowErrors: If any row is bad, with file:line and reason of each.
        ValueError: If the file does not exist or cannot be read at all.
    """
    return scan_rows(path, key=key, form=form).usable_rows()


def scan_rows(
    path: str, questions_only: bool = False, key: str = "path", form: Form | None = None
) -> FileScan:
    """Read a file; return its errors together with its rows.

    Args:
        path: JSONL file; a `.json` file with an array; either of them with `.gz`; a `.parquet` or `.csv` file; a
            folder written by `save_to_disk`; the address of one of these (see `lightning_em.sources`); or a data
            set on the hub,
            `hf://org/name[@revision][:split]`.
        questions_only: Also accept rows with a `question` and no answers, as used for evaluation.
        key: Config key that holds the path, for messages.
        form: Form to read from rows that have both `messages` and `question`, `good` and `bad`; both if not given.

    Raises:
        ValueError: If the file does not exist or cannot be read at all.
    """
    file = None if path.startswith(HUB_SCHEME) else locate(path, key)
    if file is None or is_table(file):
        return _scan_table(path, file, _Reading(path, questions_only, form))
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if file.name.endswith(_COMPRESSED):
        raise ValueError(
            f"{path} is compressed in a way that is not read here; decompress it, or use .jsonl.gz."
        )
    name = file.name.removesuffix(".gz")
    if name != file.name:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}; expected a whole gzip file.") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    reading = _Reading(path, questions_only, form)
    if name.endswith(".json") and content.lstrip().startswith(b"["):
        _scan_array(content, reading)
    else:
        _scan_lines(content, reading)
    return reading.result(sha256)


def locate(path: str, key: str = "path") -> Path:
    """Resolve a path or an address to a file or to the folder of a saved data set.

    Args:
        path: Path or address.
        key: Config key that holds it, for messages.

    Raises:
        ValueError: If there is no such file.
    """
    file = Path(sources.resolve(path, key)).expanduser()
    if not file.is_file() and not is_saved_folder(file):
        what = "a folder" if file.is_dir() else "no such file"
        raise ValueError(
            f"{path}: {what} (working directory {Path.cwd()}); expected a JSONL file, set its `path`."
        )
    return file


class _Reading:
    """Collects rows and errors while a file is read; all formats share it."""

    def __init__(self, path: str, questions_only: bool, form: Form | None) -> None:
        self.path, self.questions_only, self.form = path, questions_only, form
        self.rows: list[Row] = []
        self.errors: list[RowError] = []
        self.num_blank = 0
        self._copies: Counter[str] = Counter()
        self._line_of: dict[str, int] = {}

    def take(self, line: int, data: Any) -> None:
        """Add a row, or its error."""
        try:
            fields = row_fields(data, self.questions_only, self.form)
            row_id = given_id(data) or self._content_id(fields)
        except ValueError as error:
            self.refuse(line, str(error))
            return
        if row_id in self._line_of:
            self.refuse(line, f"id {row_id!r} is also on line {self._line_of[row_id]}")
            return
        self._line_of[row_id] = line
        self.rows.append(Row(id=row_id, path=self.path, line=line, **fields))

    def refuse(self, line: int, reason: str) -> None:
        """Add an error."""
        self.errors.append(RowError(self.path, line, reason))

    def result(self, sha256: str, revision: str | None = None) -> FileScan:
        """Return the contents of the file; a file without rows is an error."""
        if not self.rows and not self.errors:
            self.refuse(1, "the file has no rows")
        return FileScan(self.path, tuple(self.rows), tuple(self.errors), self.num_blank, sha256, revision)

    def _content_id(self, fields: dict[str, Any]) -> str:
        """Hash the content; exact copies get their occurrence number appended."""
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
        self._copies[digest] += 1
        return digest if self._copies[digest] == 1 else f"{digest}-{self._copies[digest]}"


def _scan_lines(content: bytes, reading: _Reading) -> None:
    lines = content.split(b"\n")
    ends_cleanly = not lines[-1]
    if ends_cleanly:
        lines.pop()
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            reading.num_blank += 1
            continue
        if number - reading.num_blank == 1 and raw.lstrip().startswith(b"["):
            remedy = "`jq -c '.[]'` converts it, or call it .json"
            reading.refuse(number, f"a JSON array, expected one object per line; {remedy}")
            break
        try:
            data = _decoded(raw)
        except ValueError as error:
            torn = number == len(lines) and not ends_cleanly and isinstance(error, _UnreadableError)
            reading.refuse(number, f"torn last line, the file was cut off: {error}" if torn else str(error))
            continue
        reading.take(number, data)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise _UnreadableError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise _UnreadableError(f"not JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _scan_array(content: bytes, reading: _Reading) -> None:
    """Read an array with `json`: `datasets` would lose duplicate keys and turn date-like strings into dates."""
    try:
        rows = json.loads(content.decode(), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        reading.refuse(error.lineno, f"not JSON at column {error.colno}: {error.msg}")
    except UnicodeDecodeError as error:
        reading.refuse(content.count(b"\n", 0, error.start) + 1, "not UTF-8")
    except RecursionError:
        reading.refuse(1, "nested too deeply")
    except ValueError as error:
        reading.refuse(1, str(error))
    else:
        for number, data in enumerate(rows, start=1):
            reading.take(number, data)


def _scan_table(path: str, file: Path | None, reading: _Reading) -> FileScan:
    table = read_table(path, file)
    if not {"messages", "question"} & set(table.columns):
        columns = list(table.columns)
        reading.refuse(1, f"expected a column `messages`, or `question`, `good` and `bad`; got {columns}")
    else:
        for number, data in enumerate(table.rows, start=1):
            reading.take(number, data)
    return reading.result(table.sha256, table.revision)
