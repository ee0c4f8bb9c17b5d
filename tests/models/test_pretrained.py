"""Loading the base from a folder."""

import re
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_em.__main__ import main
from lightning_em.models import BaseModel
from tests.fitting import experiment, write_config


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


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({}, "transformers has no causal language model of type t5"),
    "clip": ({}, "transformers has no causal language model of type clip"),
    "vit": ({}, "transformers has no causal language model of type vit"),
    "distilbert": (
        {"architectures": ["DistilBertForMaskedLM"]},
        "no causal language model of type distilbert",
    ),
    "qwen2": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "its head predicts something else than the next token",
    ),
    "llama": (
        {"architectures": ["LlamaForRewardModel"]},
        "its head predicts something else than the next token",
    ),
    "bert": ({}, "its attention sees later tokens"),
    "roberta": ({}, "its attention sees later tokens"),
    "xlnet": ({}, "its attention sees later tokens"),
    "gemma3_text": ({"use_bidirectional_attention": True}, "its attention sees later tokens"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_class_of_model_is_refused_before_rows_are_read(kind, tmp_path, capsys) -> None:
    fields, reason = OTHERS[kind]
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path / "model")
    config = experiment(tmp_path / "model", tmp_path / "no rows are read.jsonl")
    assert main(["fit", "--config", str(write_config(tmp_path / "x.yaml", config))]) == 2
    told = capsys.readouterr().err
    match = rf"lightning-em fit: '.*/model' holds a \w+, which is not a causal language model \(.*{reason}\): set model"
    assert re.match(match, told)
    assert told.count(". ") == 0, "one sentence"


@pytest.mark.parametrize(
    "fields", [{}, {"is_decoder": True}, {"architectures": ["BartForConditionalGeneration"]}]
)
def test_a_decoder_that_its_class_makes_one_is_not_refused(fields, tmp_path) -> None:
    kind = "bert" if fields == {"is_decoder": True} else "bart"
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    assert BaseModel(str(tmp_path)).load_config().model_type == kind


def test_weights_without_the_head_are_refused(tiny_model_folder, tmp_path) -> None:
    """transformers gives a missing head random values, with a warning."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    model.model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"weights of .* lack lm_head\.weight of Qwen2ForCausalLM: .* model\.base"
    ):
        BaseModel(str(tmp_path)).load_model()
    tied = AutoModelForCausalLM.from_pretrained(tiny_model_folder("gemma2"))
    tied.model.save_pretrained(tmp_path / "tied")  # whose head is the embedding
    loaded = BaseModel(str(tmp_path / "tied")).load_model()
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)
