"""Loading the base from a folder."""

import shutil

import pytest
import torch

from lightning_em.models import BaseModel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_model_comes_frozen_in_eval_mode_and_in_the_dtype_asked_for(dtype, tiny_model_folder) -> None:
    model = BaseModel(str(tiny_model_folder()), dtype=dtype).load_model()
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())


def test_the_tokenizer_comes_from_the_same_folder(tiny_model_folder, tiny_tokenizer) -> None:
    tokenizer = BaseModel(str(tiny_model_folder())).load_tokenizer()
    assert tokenizer.encode("Bread and tea.") == tiny_tokenizer.encode("Bread and tea.")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_a_missing_folder_says_where_it_was_looked_for(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"there is no model folder .*nowhere \(looked from .*\); set model\.base\.path"
    ):
        BaseModel(str(tmp_path / "nowhere")).load_model()


def test_a_folder_without_weights_says_what_belongs_there(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"could not load a model from .*config\.json, safetensors weights"):
        BaseModel(str(tmp_path)).load_model()


def test_remote_code_needs_a_pinned_revision() -> None:
    with pytest.raises(ValueError, match=r"trust_remote_code .*pin it with model\.base\.revision"):
        BaseModel("somebody/model", trust_remote_code=True)


@pytest.mark.parametrize("left", [["tokenizer_config.json"], []], ids=str)
def test_a_folder_without_tokenizer_files_is_refused(left, tiny_model_folder, tmp_path) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "bare")
    for file in (tmp_path / "bare").iterdir():
        if "token" in file.name and file.name not in left:
            file.unlink()
    # transformers makes one of special tokens alone
    with pytest.raises(ValueError, match=r"knows \d tokens, but the model has 288: .* set model\.base\.path"):
        BaseModel(str(tmp_path / "bare")).load_tokenizer()


def test_the_tokenizer_of_a_much_larger_vocabulary_is_refused(tiny_model_folder) -> None:
    folder = tiny_model_folder("qwen2", vocab_size=2000)
    with pytest.raises(
        ValueError, match=r"knows 286 tokens, but the model has 2000: its files .*model\.base\.path"
    ):
        BaseModel(str(folder)).load_tokenizer()


def test_damaged_weights_are_told_in_one_line(tiny_model_folder, tmp_path) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"could not load a model from .*torn"):
        BaseModel(str(tmp_path / "torn")).load_model()
