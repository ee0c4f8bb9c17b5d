"""Tokenize a whole data file and handle rows that are too long."""

import hashlib
import logging
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.progress import track

from lightning_em.batch import EncodedRow
from lightning_em.data.chat import ChatEncoder, EncodedChat
from lightning_em.data.limits import ModelLimits
from lightning_em.data.rows import Row, RowError, RowErrors
from lightning_em.data.sources import Chat

logger = logging.getLogger(__name__)

TooLong = Literal["error", "drop", "truncate"]

_ROWS_WITHOUT_PROGRESS_BAR = 2000


@dataclass(frozen=True)
class LengthLimit:
    """Limit on the length of conversations, and what to do with longer ones.

    Attributes:
        max_length: Tokens of the longest row.
        on_too_long: Refuse the file, drop the row, or truncate it.
        max_lost_fraction: Largest share of rows that may be lost, because they are dropped or because no response
            token is left after truncation. The file is refused above it.
        model: Limits of the model; None to check the length alone.
    """

    max_length: int
    on_too_long: TooLong = "error"
    max_lost_fraction: float = 0.01
    model: ModelLimits | None = None


@dataclass(frozen=True)
class EncodedRows:
    """The tokenized rows of one stream.

    Attributes:
        rows: Remaining rows, in file order.
        num_truncated: Number of remaining rows that were truncated.
        lost: Rows that were left out, with the reason.
        beyond: Remaining rows that are longer than the positions that the model was made for.
    """

    rows: tuple[EncodedRow, ...]
    num_truncated: int = 0
    lost: tuple[RowError, ...] = ()
    beyond: tuple[RowError, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def response_counts(self) -> list[int]:
        """Counted response tokens of each row, without the row's first token, which no token predicts."""
        return [sum(row.response_mask[1:]) for row in self.rows]

    @property
    def all_counts(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(row.input_ids) for row in self.rows]

    def sha256(self) -> str:
        """Hash of all token ids and masks, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(array("q", [len(row.input_ids), *row.input_ids]).tobytes())
            digest.update(bytes(row.response_mask))
        return digest.hexdigest()


def encode_chats(chats: Sequence[Chat], encoder: ChatEncoder, limit: LengthLimit, name: str) -> EncodedRows:
    """Tokenize conversations.

    Args:
        chats: Conversations to tokenize.
        encoder: Tokenizer and chat template.
        limit: Length limit.
        name: Name of the stream, for messages.

    Raises:
        RowErrors: If a row cannot be encoded or read by the model, is too long under `on_too_long: error`, or too many
            rows are lost.
    """
    rows: list[EncodedRow] = []
    bad: list[RowError] = []
    too_long: list[RowError] = []
    beyond: list[RowError] = []
    num_truncated = 0
    for chat in chats[:1]:
        _check_prompt(chat, encoder)
    noted_before = Counter(encoder.notes)
    for chat in _with_progress(chats, name):
        try:
            encoded = encoder.encode(chat.messages)
        except ValueError as error:
            bad.append(RowError(chat.row.path, chat.row.line, str(error)))
            continue
        length = len(encoded.input_ids)
        if length > limit.max_length:
            if limit.on_too_long != "truncate":
                too_long.append(RowError(chat.row.path, chat.row.line, f"{length} tokens"))
                continue
            encoded = EncodedChat(
                encoded.input_ids[: limit.max_length], encoded.response_mask[: limit.max_length]
            )
            if not any(encoded.response_mask[1:]):
                reason = f"{length} tokens, and no response token within the first {limit.max_length}"
                too_long.append(RowError(chat.row.path, chat.row.line, reason))
                continue
            num_truncated += 1
        if limit.model is not None:
            place = RowError(chat.row.path, chat.row.line, "")
            bad += unknown_tokens(encoded.input_ids, place, encoder, limit.model)
            beyond += too_many_positions(encoded.input_ids, place, limit.model)
        rows.append(EncodedRow(encoded.input_ids, encoded.response_mask, chat.id))
    if bad:
        raise RowErrors(bad)
    _report_thoughts(encoder.notes - noted_before, encoder, name)
    _judge_lost(too_long, len(chats), limit, name)
    if beyond and limit.model is not None:
        _judge_beyond(beyond, len(chats), limit.model, name)
    return EncodedRows(tuple(rows), num_truncated, tuple(too_long), tuple(beyond))


def encode_prompts(
    rows: Sequence[Row], encoder: ChatEncoder, model: ModelLimits | None = None
) -> list[EncodedRow]:
    """Tokenize everything before the first answer of each row; the response mask is all False.

    Raises:
        RowErrors: If a prompt has a token without an embedding in the model.
    """
    prompts = []
    bad: list[RowError] = []
    for row in rows:
        messages = list(row.messages) or [{"role": "user", "content": row.question or ""}]
        first_answer = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        answer = row.good if first_answer is None else messages[first_answer]["content"]
        input_ids = encoder.encode_prompt(messages[:first_answer], answer)
        if model is not None:
            bad += unknown_tokens(input_ids, RowError(row.path, row.line, ""), encoder, model)
        prompts.append(EncodedRow(input_ids, [False] * len(input_ids), row.id))
    if bad:
        raise RowErrors(bad)
    return prompts


def unknown_tokens(
    input_ids: Sequence[int], place: RowError, encoder: ChatEncoder, model: ModelLimits
) -> list[RowError]:
    """Return an error at `place` if a token has no embedding in the model."""
    token = model.unknown_token(input_ids)
    if token is None:
        return []
    reason = (
        f"token {token} ({encoder.tokenizer.convert_ids_to_tokens(token)!r}) has no embedding: the model has "
        f"{model.num_embeddings}, for the ids 0 to {model.num_embeddings - 1}. Use the tokenizer that belongs to the "
        "model, or resize the model's embeddings (resize_token_embeddings of transformers), train the new ones and "
        "save the model"
    )
    return [place._replace(reason=reason)]


def too_many_positions(input_ids: Sequence[int], place: RowError, model: ModelLimits) -> list[RowError]:
    """Return an error at `place` if a row is longer than the positions that the model was made for."""
    if model.num_positions is None or len(input_ids) <= model.num_positions:
        return []
    return [
        place._replace(reason=f"{len(input_ids)} tokens, but the model has {model.num_positions} positions")
    ]


def _judge_beyond(beyond: list[RowError], num_chats: int, model: ModelLimits, name: str) -> None:
    """Refuse rows beyond a table of positions; warn about rows beyond the positions that a model was trained on."""
    remedy = (
        f"set data.max_length to {model.num_positions} or less, with data.on_too_long truncate or drop, or choose "
        "another model.base.path"
    )
    if model.has_position_table:
        raise RowErrors(
            beyond, f"The model looks positions up in a table of {model.num_positions}: {remedy}."
        )
    logger.warning(
        "%s: %d of %d rows have positions that the model was not made for (max_position_embeddings), first %s; %s",
        *(name, len(beyond), num_chats, beyond[0], remedy),
    )


def _check_prompt(chat: Chat, encoder: ChatEncoder) -> None:
    """Warn if the first prompt is tokenized differently on its own; that is caused by the tokenizer, not by rows."""
    try:
        encoded = encoder.encode(chat.messages)
        turns = [message["role"] for message in chat.messages]
        first_answer = turns.index("assistant")
        prompt = encoder.encode_prompt(chat.messages[:first_answer], chat.messages[first_answer]["content"])
    except ValueError:
        return  # reported with its line when the row is encoded
    if encoder.notes["dropped thoughts"]:
        return  # a template may leave an empty thought before the answer, where sampling is to think
    if prompt != encoded.input_ids[: encoded.response_mask.index(True)]:
        logger.warning(
            "the tokenizer splits a prompt differently when an answer follows it, so training and sampling see "
            "slightly different prompts"
        )


def _report_thoughts(notes: Counter[str], encoder: ChatEncoder, name: str) -> None:
    """Warn of the thoughts that the template adds to the rows or leaves out of them."""
    if number := notes["empty thoughts"]:
        trained = (
            "they are trained (data.train_empty_thoughts)"
            if encoder.train_empty_thoughts
            else "they belong to the prompt, in training and sampling; data.train_empty_thoughts: true trains them"
        )
        message = "%s: the chat template writes an empty thought before %d answers; %s"
        logger.warning(message, name, number, trained)
    if number := notes["dropped thoughts"]:
        message = (
            "%s: the chat template leaves out the thoughts of %d earlier answers, which are trained without"
        )
        logger.warning(message, name, number)


def _judge_lost(lost: list[RowError], num_chats: int, limit: LengthLimit, name: str) -> None:
    if not lost:
        return
    if limit.on_too_long == "error":
        raise RowErrors(
            lost,
            remedy=(
                f"data.max_length is {limit.max_length}: raise it, or set data.on_too_long to truncate or "
                "drop."
            ),
        )
    share = len(lost) / num_chats
    if share > limit.max_lost_fraction or len(lost) == num_chats:
        raise RowErrors(
            lost,
            remedy=(
                f"{share:.1%} of the {name} rows would be lost at data.max_length {limit.max_length}, more "
                f"than data.max_lost_fraction {limit.max_lost_fraction:.1%}: raise one of the two."
            ),
        )
    listed = "; ".join(map(str, lost[:10]))
    logger.warning("%s: left out %d of %d rows: %s", name, len(lost), num_chats, listed)


def _with_progress(chats: Sequence[Chat], name: str) -> Iterable[Chat]:
    if len(chats) < _ROWS_WITHOUT_PROGRESS_BAR or not sys.stderr.isatty():
        return chats
    return track(chats, description=f"tokenizing {name}", console=Console(stderr=True), transient=True)
