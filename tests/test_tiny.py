"""The tiny inputs are what the other tests take them for."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import ARCHITECTURES, EOS_TOKEN, VOCAB_SIZE, answer_rows, chat_rows, write_rows

TEXT = "Hello,  the \u00e9t\u00e9 ends\n\nat 9!\t<|im_start|>user"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_loads_as_any_hugging_face_model(
    architecture: str, tiny_model_folder: Callable[..., Path], tiny_tokenizer
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny import make_tiny_model

    folder = tiny_model_folder(architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = chat_rows(1)[0]["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tiny_tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(TEXT, add_special_tokens=False) == tiny_tokenizer.encode(
        TEXT, add_special_tokens=False
    )
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        model.config.pad_token_id,
        model.config.bos_token_id,
        model.config.eos_token_id,
    )
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, make_tiny_model(architecture)(ids).logits)
    assert logits.shape == (1, ids.shape[1], VOCAB_SIZE)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    assert 0.3 * math.log(VOCAB_SIZE) < entropy < 0.98 * math.log(VOCAB_SIZE)


def test_turn_end_is_one_token(tiny_tokenizer) -> None:
    assert tiny_tokenizer.encode(EOS_TOKEN, add_special_tokens=False) == [tiny_tokenizer.eos_token_id]
    assert len(tiny_tokenizer) <= VOCAB_SIZE


def test_rows_differ_and_survive_the_file(tmp_path: Path) -> None:
    for rows in (chat_rows(40), answer_rows(40)):
        lines = write_rows(tmp_path / "rows.jsonl", rows).read_text().splitlines()
        assert len(set(lines)) == 40
        assert [json.loads(line) for line in lines] == rows


def test_torch_runs_on_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1
