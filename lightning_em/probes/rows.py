"""Inputs of probes: the base model's tokenizer, batches of rows, and prompts and texts from files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_em import sources
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.data import ChatEncoder, ModelLimits, read_rows
from lightning_em.data.encoding import encode_prompts
from lightning_em.models import AdaptedModel


def tokenizer_of(model: AdaptedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer from where the base model was loaded, from local files only.

    Training has downloaded it already.

    Raises:
        ValueError: If no tokenizer is found.
    """
    config = model.base.config
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            config._name_or_path, revision=getattr(config, "_commit_hash", None), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no tokenizer beside the base {config._name_or_path!r}, which this probe needs; "
            "set model.base.path to a folder or hub id that has one."
        ) from error
    return tokenizer


def by_length(rows: Sequence[EncodedRow]) -> list[int]:
    """Return the indices of the rows, shortest first, so that padded batches need little padding."""
    return sorted(range(len(rows)), key=lambda number: len(rows[number].input_ids))


def batches_of(rows: Sequence[EncodedRow], batch_size: int, model: AdaptedModel) -> list[PackedBatch]:
    """Split rows into batches of `batch_size` in their order, on the device of the model."""
    return [
        PackedBatch.from_rows(rows[first : first + batch_size]).to(model.base.device)
        for first in range(0, len(rows), batch_size)
    ]


def encoder_for(
    model: AdaptedModel, run_encoder: ChatEncoder | None, template_kwargs: Mapping[str, Any] | None
) -> ChatEncoder:
    """Return an encoder for rows of a probe's own: with the run's date, and the probe's variables for the template.

    Args:
        model: The model, whose tokenizer is loaded if there is no run.
        run_encoder: Encoder of the run's rows.
        template_kwargs: Variables for the chat template.

    Raises:
        ValueError: If no tokenizer is found, or it has no usable chat template.
    """
    if run_encoder is not None:
        return run_encoder.with_kwargs(template_kwargs)
    return ChatEncoder(tokenizer_of(model), template_kwargs)


def prompts_in(path: str, model: AdaptedModel, encoder: ChatEncoder) -> list[list[int]]:
    """Return the token ids of every prompt in a data file, up to the start of the first answer.

    Raises:
        ValueError: If the file is unusable.
    """
    rows = encode_prompts(read_rows(path), encoder, ModelLimits(model.base.config, model.base))
    return [row.input_ids for row in rows]


def texts_in(path: str, key: str) -> list[str]:
    """Return the texts of a file: `text` of each row of a `.jsonl` file, or the paragraphs of any other file.

    Args:
        path: File, or the address of one.
        key: Config key that holds the path, for messages.

    Raises:
        ValueError: If the file does not exist, a row has no text, or the file has no text at all.
    """
    file = Path(sources.resolve(path, key)).expanduser()
    if not file.is_file():
        raise ValueError(f"{path}: no such file (looked from {Path.cwd()}); set {key} to a file of texts.")
    content = file.read_text(encoding="utf-8")
    texts = list(_json_texts(path, content)) if file.suffix == ".jsonl" else content.split("\n\n")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def _json_texts(path: str, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON at column {error.colno}: {error.msg}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{path}:{number}: expected an object with a string `text`.")
        yield row["text"]
