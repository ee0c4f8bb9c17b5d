"""Find a model's files on this machine without a network, and download them with one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from lightning_em import sources
from lightning_em.models import BaseModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # any one is enough
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # not *.bin, which is a pickle


@dataclass(frozen=True)
class ModelFiles:
    """Local folder of a model, and the files that are missing.

    Attributes:
        folder: Local folder.
        missing: Names of missing files.
        num_bytes: Size of the weights in bytes.
        can_be_fetched: Whether a download would provide the missing files.
    """

    folder: Path
    missing: tuple[str, ...]
    num_bytes: int = 0
    can_be_fetched: bool = True

    @classmethod
    def find(cls, base: BaseModel) -> "ModelFiles":
        """Look for the model in a folder, in the hub's cache, or at the source of an address."""
        if sources.is_address(base.path):
            try:
                return cls._in(Path(sources.resolve(base.path, "model.base.path")), can_be_fetched=True)
            except ValueError as error:
                return cls(Path(base.path), (f"everything: {error}",), can_be_fetched=False)
        folder = Path(base.path).expanduser()
        if folder.is_dir() or base.path.startswith((".", "/", "~")):
            return cls._in(folder, can_be_fetched=False)
        try:
            cached = huggingface_hub.snapshot_download(
                base.path, revision=base.revision, allow_patterns=_WANTED, local_files_only=True
            )
        except LocalEntryNotFoundError:
            return cls(folder, ("everything: it is not in the hub's cache",))
        return cls._in(Path(cached), can_be_fetched=True)

    @classmethod
    def _in(cls, folder: Path, can_be_fetched: bool) -> "ModelFiles":
        if not folder.is_dir():
            return cls(folder, ("the folder itself",), 0, can_be_fetched)
        weights = _weight_files(folder)
        wanted = ["config.json", "tokenizer_config.json", *weights]
        missing = [name for name in wanted if not (folder / name).is_file()]
        if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
            missing.append("tokenizer.json")
        num_bytes = sum((folder / name).stat().st_size for name in weights if name not in missing)
        return cls(folder, tuple(missing), num_bytes, can_be_fetched)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights, present or not."""
    if not (folder / _INDEX).is_file():
        return [_SINGLE]
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def download(base: BaseModel) -> str:
    """Download model and tokenizer to this machine; return a message about the result.

    Raises:
        ValueError: If the hub does not have the model or cannot be reached.
    """
    if sources.is_address(base.path):
        return f"{base.path} is at {sources.resolve(base.path, 'model.base.path')}"
    if Path(base.path).expanduser().is_dir():
        return f"{base.path} is a local folder: nothing to download"
    code = ["*.py"] if base.trust_remote_code else []
    try:
        folder = huggingface_hub.snapshot_download(
            base.path,
            revision=base.revision,
            allow_patterns=[*_WANTED, *code],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except (OSError, huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"could not download {base.path}: {first_line}") from error
    return f"{base.path} is in {folder}; HF_HUB_OFFLINE=1 works from now on"
