"""Answers in a batch are those that each prompt has alone, or are sampled one by one."""

import logging
import re

import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch, single_rows
from lightning_em.models import AdaptedModel, Sampling, sample_tokens
from tests.models.zoo import VOCAB_SIZE, build

GREEDY = Sampling(max_new_tokens=5, temperature=0)
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 8.0, 16.0],
    "original_max_position_embeddings": 16, "rope_theta": 10000.0, "factor": 16.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def prompts(*lengths: int, seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return PackedBatch.from_rows(
        [EncodedRow(ids, [False] * len(ids), f"prompt-{index}") for index, ids in enumerate(made)]
    )


def adapted(kind: str, **fields) -> AdaptedModel:
    model = AdaptedModel(build(kind, **fields), SteeringVector(1, alpha=1.0))
    model.adapter.vector.data.normal_(generator=torch.Generator().manual_seed(1))
    return model


def passes(model: AdaptedModel) -> list[int]:
    """Prompts in each call of `generate`, filled as the model runs."""
    rows, generate = [], model.base.generate

    def counted(**options):
        rows.append(len(options["input_ids"]))
        return generate(**options)

    model.base.generate = counted
    return rows


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("rwkv", {}, "model type rwkv is not on the list of those whose answers in a batch are verified"),
        ("recurrent_gemma", {}, "model type recurrent_gemma is not on the list"),
        ("roformer", {}, "model type roformer is not on the list"),
        (
            "phi3",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
            r"its rotary embedding \(longrope\) depends on the longest row of a batch",
        ),
        (
            "llama",
            {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
            r"its rotary embedding \(dynamic\)",
        ),
    ],
)
def test_where_a_batch_gives_other_answers_prompts_are_answered_one_by_one(
    kind, fields, reason, caplog
) -> None:
    batch = prompts(4, 20, 9, 12)
    model = adapted(kind, **fields)
    rows = passes(model)
    with caplog.at_level(logging.WARNING, logger="lightning_em.models.generation"):
        together = sample_tokens(model, batch, GREEDY)
        sample_tokens(model, batch, GREEDY)
    (line,) = [record.message for record in caplog.records if record.name == "lightning_em.models.generation"]
    assert re.match(rf"prompts are answered one by one \(slower\): {reason}", line)
    assert rows == [1] * 8
    alone = [sample_tokens(adapted(kind, **fields), row, GREEDY)[0] for row in single_rows(batch)]
    assert together == alone
    drawn = sample_tokens(model, prompts(4, 20, 4), Sampling(max_new_tokens=5, answers_per_prompt=2))
    assert [len(answers) for answers in drawn] == [2, 2, 2]
    assert len({tuple(answer) for answers in drawn for answer in answers}) == 6, "each draws on its own"


@pytest.mark.parametrize(
    ("kind", "fields", "lengths"),
    [
        ("llama", {}, (4, 20, 9)),
        ("jamba", {}, (4, 20, 9)),
        ("mamba2", {}, (4, 20, 9)),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, (4, 11, 9)),
    ],
)
def test_where_it_gives_the_same_they_share_a_batch(kind, fields, lengths, caplog) -> None:
    model, batch = adapted(kind, **fields), prompts(*lengths)
    rows = passes(model)
    with caplog.at_level(logging.WARNING, logger="lightning_em.models.generation"):
        together = sample_tokens(model, batch, GREEDY)
    assert rows == [3]
    assert not [record for record in caplog.records if record.name == "lightning_em.models.generation"]
    assert together == [sample_tokens(adapted(kind, **fields), row, GREEDY)[0] for row in single_rows(batch)]


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "llama"])
def test_float64_with_eager_attention_has_the_answers_of_float32(kind) -> None:
    """Padding of which all is masked is NaN there, and spreads."""
    batch = prompts(4, 20, 9)
    fields = {"attn_implementation": "eager"} if kind == "llama" else {}
    model = adapted(kind, **fields)
    expected, logits = sample_tokens(model, batch, GREEDY), model.logits(batch)
    assert model.base.config._attn_implementation == "eager"
    model.base.double()
    model.base.config.dtype = torch.float64
    rows = passes(model)
    assert sample_tokens(model, batch, GREEDY) == expected
    assert rows == [1, 1, 1]
    torch.testing.assert_close(model.logits(batch).float(), logits, rtol=1e-3, atol=1e-3)
    padded = batch.padded()
    with torch.no_grad():
        left = model.base(
            input_ids=padded.input_ids.flip(1), attention_mask=padded.attention_mask.flip(1), use_cache=False
        ).logits
    assert left.isnan().any()  # or nothing would have been at stake


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_are_no_answer(temperature) -> None:
    model = adapted("llama")
    model.adapter.vector.data[0] = float("inf")
    match = r"the logits of the answer to prompt-0 are NaN in float32 with sdpa attention, .* set model\.base\.dtype"
    with pytest.raises(ValueError, match=match):
        sample_tokens(model, prompts(4, 9), Sampling(max_new_tokens=3, temperature=temperature))
    assert sample_tokens(model, prompts(4, 9), Sampling(max_new_tokens=3, temperature=temperature), scale=0.0)
