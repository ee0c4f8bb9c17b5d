"""Rows that a model cannot read, or was not made for."""

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_em.__main__ import main
from lightning_em.adapters import SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.cluster.doctor import check
from lightning_em.data import ChatEncoder, ModelLimits, read_rows
from lightning_em.data.encoding import encode_prompts
from lightning_em.models import AdaptedModel, Sampling, sample_tokens
from tests.fitting import experiment, write_config
from tests.models.zoo import build
from tests.tiny import VOCAB_SIZE, make_tiny_folder, make_tiny_tokenizer, write_chat_rows

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def with_table(folder: Path, num_positions: int) -> Path:
    """A GPT-2 with the tiny tokenizer."""
    sizes = {"n_positions": num_positions, "vocab_size": VOCAB_SIZE}
    build("gpt2", **sizes).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def fitted(tmp_path, capsys, caplog):
    """Fit on a model folder, and give the exit code with all that was said."""

    def fit(model: Path, *flags: str) -> tuple[int, str]:
        rows = write_chat_rows(tmp_path / "rows.jsonl", 16)
        config = experiment(model, rows, trainer={"max_epochs": 1}, run={"root": str(tmp_path / "runs")})
        file = write_config(tmp_path / "x.yaml", config)
        capsys.readouterr()
        with caplog.at_level(logging.WARNING, logger="lightning_em"):
            code = main(["fit", "--config", str(file), *flags])
        return code, capsys.readouterr().err + caplog.text

    return fit


def findings(tmp_path: Path) -> dict[str, tuple[str, str]]:
    found = check(["--config", str(tmp_path / "x.yaml")])
    return {finding.topic: (finding.level, finding.text) for finding in found}


def test_rows_beyond_the_positions_of_rotary_embeddings_are_named(fitted, tmp_path, capsys) -> None:
    model = make_tiny_folder(tmp_path / "model", "llama", max_position_embeddings=128)
    code, told = fitted(model)
    assert code == 0
    named = r"rows\.jsonl:\d+: \d+ tokens, but the model has 128 positions"
    assert re.search(
        rf"narrow train: \d+ of \d+ rows have positions .*\(max_position_embeddings\), first .*{named}", told
    )
    assert "set data.max_length to 128 or less, with data.on_too_long truncate or drop" in told
    level, text = findings(tmp_path)["data narrow"]
    assert level == "warning"
    assert re.search(rf"positions that the model was not made for in \d+ rows, first .*{named}", text)
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--base", str(model)]) == 0
    # without white space: a long path is wrapped inside a word
    assert re.search(named.replace(" ", ""), re.sub(r"\s+", "", capsys.readouterr().out))
    limits = ["--data.max_length", "128", "--data.on_too_long", "truncate", "--run.name", "short"]
    code, told = fitted(model, *limits)
    assert code == 0


def test_rows_beyond_a_table_of_positions_are_refused(fitted, tmp_path, capsys) -> None:
    model = with_table(tmp_path / "model", 128)
    code, told = fitted(model)
    assert code == 2
    assert re.search(r"rows\.jsonl:\d+: \d+ tokens, but the model has 128 positions", told)
    assert "The model looks positions up in a table of 128: set data.max_length to 128 or less" in told
    assert findings(tmp_path)["data"][0] == "fault"
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--base", str(model)]) == 1
    assert re.search(
        r"FAULT .* rows that the model cannot read, first", re.sub(r"\s+", " ", capsys.readouterr().out)
    )
    code, told = fitted(
        model, "--data.max_length", "128", "--data.on_too_long", "truncate", "--run.name", "short"
    )
    assert code == 0, told


def test_tokens_without_an_embedding_are_refused(fitted, tmp_path, capsys) -> None:
    """As after adding tokens to a tokenizer without resizing the model."""
    model = make_tiny_folder(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>", "<|c|>", "<|stop|>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|stop|>")
    tokenizer.save_pretrained(model)
    stop = tokenizer.convert_tokens_to_ids("<|stop|>")
    assert stop >= VOCAB_SIZE
    code, told = fitted(model)
    assert code == 2
    reason = (
        rf"rows\.jsonl:\d+: token {stop} \('<\|stop\|>'\) has no embedding: the model has {VOCAB_SIZE}, for"
    )
    assert re.search(reason, told)
    assert "resize_token_embeddings" in told
    level, text = findings(tmp_path)["data"]
    assert level == "fault"
    assert re.search(reason, text)
    assert main(["data", "check", str(tmp_path / "rows.jsonl"), "--base", str(model)]) == 1
    assert "that the model cannot read" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_prompt_alone_may_hold_the_token_without_an_embedding(tmp_path) -> None:
    """Sampling would fail on a token that no training row has."""
    model = make_tiny_folder(tmp_path / "model", "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>", "<|go|>"]})
    opening = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    assert opening in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        opening, "{% if add_generation_prompt %}{{ '<|go|>' }}"
    )
    rows = read_rows(str(write_chat_rows(tmp_path / "rows.jsonl", 2)))
    limits = ModelLimits(AutoModelForCausalLM.from_pretrained(model).config)
    with pytest.raises(ValueError, match=r"rows\.jsonl:\d+: token \d+ \('<\|go\|>'\) has no embedding"):
        encode_prompts(rows, ChatEncoder(tokenizer), limits)


def test_padding_without_an_embedding_is_not_looked_up() -> None:
    """A padding token is often added to the tokenizer alone."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id >= VOCAB_SIZE
    model = AdaptedModel(build("llama", vocab_size=VOCAB_SIZE), SteeringVector(1))
    rows = [EncodedRow(list(range(9, 9 + n)), [False] * n, str(n)) for n in (3, 7)]
    greedy = Sampling(max_new_tokens=3, temperature=0)
    together = sample_tokens(model, PackedBatch.from_rows(rows), greedy, tokenizer=tokenizer)
    alone = [sample_tokens(model, PackedBatch.from_rows([r]), greedy, tokenizer=tokenizer)[0] for r in rows]
    assert together == alone


def test_answers_beyond_a_table_of_positions_are_refused() -> None:
    model = AdaptedModel(build("opt"), SteeringVector(1))
    prompt = PackedBatch.from_rows([EncodedRow([5] * 100, [False] * 100, "a")])
    with pytest.raises(
        ValueError, match=r"prompt has 100 tokens and an answer up to 29, but .* 128 .* at most 28"
    ):
        sample_tokens(model, prompt, Sampling(max_new_tokens=29))
    assert sample_tokens(model, prompt, Sampling(max_new_tokens=28))
    rotary = AdaptedModel(build("llama"), SteeringVector(1))
    assert sample_tokens(rotary, prompt, Sampling(max_new_tokens=29))


TABLES = ("gpt2", "opt", "gptj", "codegen", "gpt_neo", "ctrl", "biogpt", "bart", "mpt")
COMPUTED = ("llama", "gpt_neox", "bloom", "falcon", "mamba", "xglm", "gemma3", "phi3")


@pytest.mark.parametrize("kind", [*TABLES, *COMPUTED])
@torch.no_grad()
def test_a_table_of_positions_is_found_by_what_a_longer_row_does(kind) -> None:
    model = build(kind)
    for limits in (ModelLimits(model.config), ModelLimits(model.config, model)):
        assert limits.num_positions in (128, None)
        assert limits.has_position_table == (kind in TABLES)
    assert model(torch.full((1, 128), 5), use_cache=False).logits.shape[1] == 128
    longer = torch.full((1, 130), 5)
    if kind in TABLES:
        with pytest.raises((IndexError, RuntimeError)):
            model(longer, use_cache=False)
    else:
        model(longer, use_cache=False)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {}, 128),
        ("llama", {"rope_parameters": YARN}, 256),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 256),
        ("llama", {"rope_parameters": YARN | {"factor": 1.5}}, 128),
        ("gpt2", {}, 128),
        ("gemma3", {}, 128),
        ("bloom", {}, None),
    ],
)
def test_the_number_of_positions_is_that_of_the_scaled_embedding(kind, fields, expected) -> None:
    assert ModelLimits(build(kind, **fields).config).num_positions == expected
