"""Rows of both streams: read from files, split and tokenized."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_em.batch import EncodedRow
from lightning_em.data.chat import ChatEncoder
from lightning_em.data.encoding import EncodedRows, LengthLimit, encode_chats, encode_prompts
from lightning_em.data.rows import Row, scan_rows
from lightning_em.data.sources import Chat, ChatSource, as_chats, hold_out, select_rows

logger = logging.getLogger(__name__)

Stream = Literal["narrow", "kl"]
Split = Literal["train", "validation"]


class Streams:
    """Training and held-out rows of each stream.

    Args:
        sources: Training file of each stream, and its validation file if there is one.
        narrow_extra: Additional rows to train on, none of which is held out.
        validation_fraction: Share of the questions to hold out if there is no validation file.
        seed: Seed of the choice of answers in mixed rows.

    Attributes:
        held_out_prompts: Prompts of the held-out narrow rows: everything before the first answer.
    """

    def __init__(
        self,
        sources: Mapping[Stream, tuple[ChatSource, ChatSource | None]],
        narrow_extra: ChatSource | None,
        validation_fraction: float,
        seed: int,
    ) -> None:
        self.sources, self.narrow_extra = sources, narrow_extra
        self.validation_fraction, self.seed = validation_fraction, seed
        self.held_out_prompts: list[EncodedRow] = []
        self._encoded: dict[tuple[Stream, Split], EncodedRows] = {}
        self._files: dict[str, str] = {}

    def read(self, encoder: ChatEncoder, limit: LengthLimit) -> None:
        """Read and tokenize all files.

        Args:
            encoder: Tokenizer and chat template.
            limit: Length limit, and what to do with longer rows.

        Raises:
            ValueError: If a file or a row cannot be used; the message says where and why.
        """
        for stream, (source, validation) in self.sources.items():
            train, held_out = self._split(stream, source, validation)
            chats = self._chats(train, source)
            if stream == "narrow":
                chats += self._extra_chats(held_out)
            self._encode(stream, "train", chats, encoder, limit)
            if held_out:
                chats = self._chats(held_out, validation or source)
                self._encode(stream, "validation", chats, encoder, limit)
                if stream == "narrow":
                    self.held_out_prompts = encode_prompts(held_out, encoder, limit.model)

    def held_out(self, stream: Stream) -> list[Row]:
        """Read the held-out rows of a stream, not tokenized."""
        return self._split(stream, *self.sources[stream])[1]

    def rows(self, stream: Stream, split: Split) -> EncodedRows:
        """Return the tokenized rows; empty if the stream or its held-out part does not exist."""
        return self._encoded.get((stream, split), EncodedRows(()))

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of each file and of each stream's tokens and masks, and the commits of hub data sets."""
        tokens = {
            f"{stream}.{split}.tokens": rows.sha256() for (stream, split), rows in self._encoded.items()
        }
        return self._files | tokens

    def _split(
        self, stream: Stream, source: ChatSource, validation: ChatSource | None
    ) -> tuple[list[Row], list[Row]]:
        rows = self._read(source, stream)
        if validation is not None:
            return rows, self._read(validation, f"{stream}_validation")
        return hold_out(rows, self.validation_fraction)

    def _chats(self, rows: Sequence[Row], source: ChatSource) -> list[Chat]:
        return as_chats(rows, source.answer, self.seed, source.bad_share)

    def _extra_chats(self, held_out: Sequence[Row]) -> list[Chat]:
        """Return the rows mixed into the narrow stream, with `extra/` ids and without held-out questions."""
        if self.narrow_extra is None:
            return []
        prompts = {row.prompt for row in held_out}
        rows = [row for row in self._read(self.narrow_extra, "narrow_extra") if row.prompt not in prompts]
        return [chat._replace(id=f"extra/{chat.id}") for chat in self._chats(rows, self.narrow_extra)]

    def _read(self, source: ChatSource, name: str) -> list[Row]:
        scan = scan_rows(source.path, key=f"data.{name}.path", form=source.form)
        self._files[f"{name}.file"] = scan.sha256
        if scan.revision is not None:
            self._files[f"{name}.revision"] = scan.revision
        return select_rows(scan.usable_rows(), source)

    def _encode(
        self, stream: Stream, split: Split, chats: list[Chat], encoder: ChatEncoder, limit: LengthLimit
    ) -> None:
        encoded = encode_chats(chats, encoder, limit, f"{stream} {split}")
        self._encoded[stream, split] = encoded
        if encoded.num_truncated:
            message = "%s %s: %d of %d rows are truncated to data.max_length %d"
            logger.info(message, stream, split, encoded.num_truncated, len(encoded), limit.max_length)
