"""Check data files before a run: contents, errors and overlap."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import yaml

from lightning_em.config_args import load_yaml
from lightning_em.data.chat import ChatEncoder
from lightning_em.data.encoding import too_many_positions, unknown_tokens
from lightning_em.data.limits import ModelLimits
from lightning_em.data.overlap import Match, Question, find_matches
from lightning_em.data.rows import FileScan, Row, RowError, locate, scan_rows
from lightning_em.data.sources import ChatSource
from lightning_em.data.template import Message

Purpose = Literal["train", "kl", "evaluation"]

_STOPS = tuple(".!?\"')]}*`:;\u2026\u3002\uff01\uff1f\u201d\u2019")


@dataclass(frozen=True)
class Lengths:
    """Statistics of the lengths of one kind of text, in characters.

    Attributes:
        count: Number of texts.
        shortest: Length of the shortest text.
        mean: Mean length.
        longest: Length of the longest text.
        histogram: Upper bound and count of each bin; each bound is twice the previous one.
    """

    count: int
    shortest: int
    mean: float
    longest: int
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FileReport:
    """Contents of one file.

    Attributes:
        purpose: Use of the file: training, KL or evaluation.
        scan: Rows, errors, number of blank lines and hash of the file.
        questions: Questions of the rows.
        topics: Number of rows of each topic; the key None counts rows without a topic.
        lengths: Length statistics by role, or by `question`, `good` and `bad`.
        repeated: Questions that repeat those of an earlier row of the file.
        num_unfinished: Number of answers without final punctuation, a sign of truncated text.
        num_truncated: Number of rows that would be truncated at the maximum length; None without a tokenizer.
        num_lost: Number of rows that would lose their whole response; None without a tokenizer.
        unusable: Rows that the tokenizer's chat template rejects.
        unreadable: Rows that the model cannot read: tokens without an embedding, or more than its table of positions.
        beyond: Rows that are longer than the positions that the model was made for.
        thoughts: Number of thoughts that the template adds or leaves out, as in `ChatEncoder.notes`.
    """

    purpose: Purpose
    scan: FileScan
    questions: tuple[Question, ...]
    topics: Mapping[str | None, int]
    lengths: Mapping[str, Lengths]
    repeated: tuple[Match, ...]
    num_unfinished: int
    num_truncated: int | None = None
    num_lost: int | None = None
    unusable: tuple[RowError, ...] = ()
    unreadable: tuple[RowError, ...] = ()
    beyond: tuple[RowError, ...] = ()
    thoughts: Mapping[str, int] = field(default_factory=dict)


class Overlap(NamedTuple):
    """Questions shared by files of two purposes."""

    first: Purpose
    second: Purpose
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class DataReport:
    """Result of checking the files of a run.

    Attributes:
        files: Report of each file.
        overlaps: Overlaps between training, KL and evaluation files.
        faults: Problems to fix before a run, one line each.
        held_out_topics: Topics of evaluation rows that do not occur in training rows.
        shared_topics: Topics of evaluation rows that also occur in training rows.
    """

    files: tuple[FileReport, ...]
    overlaps: tuple[Overlap, ...]
    faults: tuple[str, ...]
    held_out_topics: tuple[str, ...]
    shared_topics: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """Return 0 if a run may start, else 1."""
        return 1 if self.faults else 0


def check_files(
    train: Sequence[str | ChatSource],
    kl: Sequence[str | ChatSource] = (),
    evaluation: Sequence[str] = (),
    encoder: ChatEncoder | None = None,
    max_length: int = 2048,
    allow_overlap: bool = False,
    model: ModelLimits | None = None,
) -> DataReport:
    """Check the files of a run.

    Faults are bad rows, rows that the chat template rejects or the model cannot read, and evaluation questions that
    also occur in training or KL files: exactly, up to case and spacing, or nearly.

    Args:
        train: JSONL files to train on; a `ChatSource` also says which form is read from rows that have both.
        kl: JSONL files of the KL term.
        evaluation: JSONL files or YAML question files to evaluate with.
        encoder: Tokenizer and chat template, used to find rows that are too long; without it, only lengths in
            characters are reported.
        max_length: Tokens of the longest row.
        allow_overlap: Report evaluation questions in training files without counting them as a fault.
        model: Limits of the model that the rows are for; used together with the encoder.

    Raises:
        ValueError: If a file is missing.
    """
    by_purpose: list[tuple[Purpose, Sequence[str | ChatSource]]] = [
        ("train", train),
        ("kl", kl),
        ("evaluation", evaluation),
    ]
    files = tuple(
        _check_file(path, purpose, encoder, max_length, model)
        for purpose, paths in by_purpose
        for path in paths
    )
    pairs: list[tuple[Purpose, Purpose]] = [("train", "kl"), ("train", "evaluation"), ("kl", "evaluation")]
    found = [_overlap(files, first, second) for first, second in pairs]
    overlaps = tuple(overlap for overlap in found if overlap is not None)
    faults = [fault for file in files for fault in _faults(file)]
    if not allow_overlap:
        faults += [
            f"{len(overlap.matches)} evaluation questions are in the {overlap.first} files, first "
            f"{overlap.matches[0].second} as {overlap.matches[0].first}; remove them, or allow the overlap"
            for overlap in overlaps
            if overlap.second == "evaluation" and overlap.matches
        ]
    asked, trained = _topics(files, "evaluation"), _topics(files, "train")
    return DataReport(
        files, overlaps, tuple(faults), tuple(sorted(asked - trained)), tuple(sorted(asked & trained))
    )


def _check_file(
    source: str | ChatSource,
    purpose: Purpose,
    encoder: ChatEncoder | None,
    max_length: int,
    model: ModelLimits | None,
) -> FileReport:
    path, form = (source.path, source.form) if isinstance(source, ChatSource) else (source, None)
    if path.endswith((".yaml", ".yml")):
        scan, questions = _question_file(path)
    else:
        scan = scan_rows(path, purpose == "evaluation", form=form)
        questions = tuple(Question(row.path, row.line, row.prompt) for row in scan.rows)
    texts = _texts_by_kind(scan.rows)
    answers = [text for kind in ("assistant", "good", "bad") for text in texts.get(kind, ())]
    report = FileReport(
        purpose,
        scan,
        questions,
        Counter(row.topic for row in scan.rows),
        {kind: _lengths(values) for kind, values in texts.items()},
        tuple(find_matches(questions)),
        sum(not text.rstrip().endswith(_STOPS) for text in answers),
    )
    return report if encoder is None else _with_tokens(report, encoder, max_length, model)


def _with_tokens(
    report: FileReport, encoder: ChatEncoder, max_length: int, model: ModelLimits | None
) -> FileReport:
    num_truncated = num_lost = 0
    unusable: list[RowError] = []
    unreadable: list[RowError] = []
    beyond: list[RowError] = []
    noted_before = Counter(encoder.notes)
    for row in report.scan.rows:
        try:
            chats = [encoder.encode(messages) for messages in _conversations(row)]
        except ValueError as error:
            unusable.append(RowError(row.path, row.line, str(error)))
            continue
        for chat in chats:
            num_truncated += len(chat.input_ids) > max_length
            num_lost += not any(chat.response_mask[1:max_length])
            if model is not None:
                place = RowError(row.path, row.line, "")
                unreadable += unknown_tokens(chat.input_ids, place, encoder, model)
                beyond += too_many_positions(chat.input_ids, place, model)
    if beyond and model is not None and model.has_position_table:
        unreadable, beyond = [*unreadable, *beyond], []
    return replace(
        report,
        num_truncated=num_truncated,
        num_lost=num_lost,
        unusable=tuple(unusable),
        unreadable=tuple(unreadable),
        beyond=tuple(beyond),
        thoughts=encoder.notes - noted_before,
    )


def _conversations(row: Row) -> list[tuple[Message, ...]]:
    question: Message = {"role": "user", "content": row.question or ""}
    answers = [answer for answer in (row.good, row.bad) if answer is not None]
    asked = [(question, Message(role="assistant", content=answer)) for answer in answers]
    return [row.messages, *asked] if row.messages else [*asked]


def _texts_by_kind(rows: Iterable[Row]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for row in rows:
        for message in row.messages:
            texts.setdefault(message["role"], []).append(message["content"])
        for kind in ("question", "good", "bad"):
            if (text := getattr(row, kind)) is not None:
                texts.setdefault(kind, []).append(text)
    return texts


def _lengths(texts: Sequence[str]) -> Lengths:
    lengths = [len(text) for text in texts]
    bounds = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths if length)
    return Lengths(
        len(lengths), min(lengths), sum(lengths) / len(lengths), max(lengths), tuple(sorted(bounds.items()))
    )


def _question_file(path: str) -> tuple[FileScan, tuple[Question, ...]]:
    """Read a YAML list of maps with `paraphrases`; the index of an entry serves as its line number."""
    content = locate(path).read_bytes()
    errors: list[RowError] = []
    questions: list[Question] = []
    try:
        entries: Any = load_yaml(content, path)
    except yaml.YAMLError as error:
        entries, errors = [], [RowError(path, 1, f"not YAML: {error}")]
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        paraphrases = entry.get("paraphrases") if isinstance(entry, dict) else None
        if isinstance(paraphrases, list) and all(isinstance(text, str) for text in paraphrases):
            questions += [Question(path, number, text) for text in paraphrases]
        else:
            shown = json.dumps(entry, default=str)[:80]
            errors.append(RowError(path, number, f"entry has no list `paraphrases`: {shown}"))
    return FileScan(path, (), tuple(errors), 0, hashlib.sha256(content).hexdigest()), tuple(questions)


def _overlap(files: Sequence[FileReport], first: Purpose, second: Purpose) -> Overlap | None:
    left, right = (
        [question for file in files if file.purpose == purpose for question in file.questions]
        for purpose in (first, second)
    )
    return Overlap(first, second, tuple(find_matches(left, right))) if left and right else None


def _faults(file: FileReport) -> list[str]:
    faults = []
    if file.scan.errors:
        faults.append(f"{file.scan.path}: {len(file.scan.errors)} bad rows, first {file.scan.errors[0]}")
    if file.unusable:
        faults.append(
            f"{file.scan.path}: {len(file.unusable)} rows rejected by the chat template, first {file.unusable[0]}"
        )
    if file.unreadable:
        faults.append(
            f"{file.scan.path}: {len(file.unreadable)} rows that the model cannot read, first {file.unreadable[0]}"
        )
    return faults


def _topics(files: Sequence[FileReport], purpose: Purpose) -> set[str]:
    return {topic for file in files if file.purpose == purpose for topic in file.topics if topic is not None}
