"""Settings and fixtures of the whole test session."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before anything imports torch or transformers; subprocesses and spawned ranks inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point the package's cache at a folder of this session, unless the caller chose one."""
    cache = os.environ.setdefault("LIGHTNING_EM_CACHE", str(tmp_path_factory.mktemp("cache")))
    return Path(cache)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Give the byte-level tokenizer with a ChatML template; do not change it in place."""
    from tests.tiny import make_tiny_tokenizer

    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give `folder(architecture, dtype, seed, **config fields)`; each is written once a session."""
    from tests.tiny import make_tiny_folder

    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def folder(architecture: str = "qwen2", dtype: Any = "float32", seed: int = 0, **overrides: Any) -> Path:
        key = repr((architecture, str(dtype), seed, sorted(overrides.items())))
        if key not in made:
            made[key] = make_tiny_folder(
                root / f"{len(made):02d}-{architecture}", architecture, dtype, seed, **overrides
            )
        return made[key]

    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a JSONL file of 40 `messages` rows; do not change it in place."""
    from tests.tiny import write_chat_rows

    return write_chat_rows(tmp_path_factory.mktemp("rows") / "chat.jsonl")


@pytest.fixture(scope="session")
def answer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a JSONL file of 40 `question`, `good`, `bad` rows; do not change it in place."""
    from tests.tiny import write_answer_rows

    return write_answer_rows(tmp_path_factory.mktemp("rows") / "answers.jsonl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, one for each half of the list: two workers start at its beginning and its middle."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = [item for item in items if not item.get_closest_marker("slow")]
    half = len(rest) // 2
    items[:] = [*slow[::2], *rest[:half], *slow[1::2], *rest[half:]]
