"""Select conversations from a data file: by rows, by topics, and the good or the bad answer."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_em.data.checks import Form
from lightning_em.data.rows import Row, RowError, RowErrors
from lightning_em.data.template import Message

AnswerKind = Literal["messages", "good", "bad", "mixed", "both"]


@dataclass(frozen=True)
class ChatSource:
    """A data file and which of its conversations to use.

    Attributes:
        path: JSONL file (or `.jsonl.gz`); or what the `datasets` package reads: `.json` (an array), `.parquet`,
            `.csv`, or a folder written by `save_to_disk`; or the address of one of these, such as
            `miniature://seed-0/data/kl_train.jsonl` (see `lightning_em.sources`); or a data set on the Hugging Face
            hub, `hf://org/name[@revision][:split]` with split `train` by default. Name a commit as the revision,
            so that the run can be repeated; run.json records it in any case.
        answer: `messages` for rows with that key. For rows with `question`, `good` and `bad`: `good`, `bad`,
            `mixed` (one of the two per row, drawn from the row's id and the seed) or `both`. It also says which form
            is read from rows that have both.
        limit: Number of rows to take: the first ones in the file that match the topics.
        topics: Topics to keep; all rows without it.
        exclude_topics: Topics to leave out.
        bad_share: Share of bad answers if `answer` is mixed.
    """

    path: str
    answer: AnswerKind = "messages"
    limit: int | None = None
    topics: list[str] | None = None
    exclude_topics: list[str] | None = None
    bad_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.bad_share <= 1 or (self.bad_share != 0.5 and self.answer != "mixed"):
            raise ValueError(
                f"bad_share must lie in [0, 1] and needs answer: mixed, got {self.bad_share} with answer: "
                f"{self.answer}; leave it out for other answers."
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}; leave it out to take every row.")

    @property
    def form(self) -> Form:
        """The form that `answer` needs, which decides how rows with both forms are read."""
        return "messages" if self.answer == "messages" else "question"


class Chat(NamedTuple):
    """A conversation to train or evaluate on."""

    id: str
    messages: tuple[Message, ...]
    row: Row


def select_rows(rows: Sequence[Row], source: ChatSource) -> list[Row]:
    """Apply the topics and the limit of `source`.

    Raises:
        ValueError: If a topic is not in the file, a row has no topic, or no rows are left.
    """
    selected = list(rows)
    if source.topics is not None or source.exclude_topics is not None:
        if missing := [RowError(row.path, row.line, "no topic") for row in rows if row.topic is None]:
            raise RowErrors(missing, remedy="Selecting by topics needs a `topic` in every row.")
        known = {row.topic for row in rows}
        for name in ("topics", "exclude_topics"):
            if unknown := sorted(set(getattr(source, name) or ()) - known):
                raise ValueError(
                    f"{name} {unknown} not in {source.path}, which has {sorted(map(str, known))}."
                )
        keep = known if source.topics is None else set(source.topics)
        keep = keep - set(source.exclude_topics or ())
        selected = [row for row in rows if row.topic in keep]
    selected = selected[: source.limit]
    if not selected:
        raise ValueError(f"no row of {source.path} is left after topics and exclude_topics.")
    return selected


def hold_out(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split rows into training and held-out rows, both in file order.

    Whole questions are held out, so that no question is in both parts. Those with the smallest hash are taken,
    so the choice is the same for every seed and every order of the file.

    Args:
        rows: All rows of a file.
        fraction: Share of the distinct questions to hold out, rounded up.

    Raises:
        ValueError: If no question would be left for training.
    """
    prompts = sorted({row.prompt for row in rows}, key=lambda prompt: hash_share("validation", prompt))
    num_held_out = math.ceil(len(prompts) * fraction)
    if num_held_out >= len(prompts):
        raise ValueError(
            f"{rows[0].path} has {len(prompts)} distinct question{'s' if len(prompts) > 1 else ''}, too few "
            "to hold any out: set data.validation_fraction to 0 or give validation files."
        )
    held_out = set(prompts[:num_held_out])
    return (
        [row for row in rows if row.prompt not in held_out],
        [row for row in rows if row.prompt in held_out],
    )


def as_chats(rows: Sequence[Row], answer: AnswerKind, seed: int = 0, bad_share: float = 0.5) -> list[Chat]:
    """Convert rows to conversations.

    Args:
        rows: Rows of one file.
        answer: Which answer to take, see `ChatSource`. `mixed` draws from a hash of the seed and the row's id, so
            a row keeps its answer no matter which other rows there are; `both` gives two conversations per
            row, `<id>/good` and `<id>/bad`.
        seed: Seed of the draw for `mixed`.
        bad_share: Share of bad answers for `mixed`; a row that is bad at one share is bad at every larger one.

    Raises:
        RowErrors: If a row does not have the form that `answer` needs.
    """
    wrong_form = [
        row for row in rows if not (row.messages if answer == "messages" else row.question is not None)
    ]
    if wrong_form:
        if answer == "messages":
            reason = "has `question`, `good`, `bad` but `answer` is messages"
            remedy = "Set `answer` of this file to good, bad, mixed or both."
        else:
            reason = f"has `messages` but `answer` is {answer}"
            remedy = "Set `answer` of this file to messages, or give rows with `question`, `good` and `bad`."
        raise RowErrors([RowError(row.path, row.line, reason) for row in wrong_form], remedy)
    chats: list[Chat] = []
    for row in rows:
        if answer == "messages":
            chats.append(Chat(row.id, row.messages, row))
        elif answer == "both":
            chats += [Chat(f"{row.id}/{kind}", _dialogue(row, kind), row) for kind in ("good", "bad")]
        elif answer == "mixed":
            kind = "good" if hash_share(seed, row.id) < 1 - bad_share else "bad"
            chats.append(Chat(row.id, _dialogue(row, kind), row))
        else:
            chats.append(Chat(row.id, _dialogue(row, answer), row))
    return chats


def hash_share(*key: object) -> float:
    """Return a number in [0, 1) from a hash of `key`: the same on every machine and in every order."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _dialogue(row: Row, kind: str) -> tuple[Message, ...]:
    answer = row.good if kind == "good" else row.bad
    assert row.question is not None
    assert answer is not None
    return ({"role": "user", "content": row.question}, {"role": "assistant", "content": answer})
