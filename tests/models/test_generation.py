"""Sampled answers: the right distribution, and draws that belong to a row and not to its batch."""

import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.models import AdaptedModel, Sampling, sample_answers, sample_tokens
from lightning_em.models.generation import _Draws
from tests.tiny import make_tiny_model, make_tiny_tokenizer

TEXTS = ["How?", "Tell me all about the bread, please.", "Why is tea green", "And then"]


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    # float64, so that the rounding of padded batches decides nothing
    return AdaptedModel(make_tiny_model(dtype="float64"), SteeringVector(layer=1))


@pytest.fixture(scope="module")
def rows() -> list[EncodedRow]:
    tokenizer = make_tiny_tokenizer()
    return [
        EncodedRow(ids, [False] * len(ids), text) for text in TEXTS if (ids := tokenizer(text)["input_ids"])
    ]


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, -torch.inf, 0.5, 0.0])
    num_draws, temperature = 20_000, 0.7
    one = PackedBatch.from_rows([EncodedRow([1], [False], "row")])
    draws = _Draws(one, Sampling(max_new_tokens=num_draws, temperature=temperature), prompt_length=1)
    context = torch.zeros(1, 1, dtype=torch.long)
    drawn = torch.zeros(5, dtype=torch.float64)
    for position in range(num_draws):
        scores = draws(context.expand(1, 1 + position), logits[None])
        drawn[scores.argmax()] += 1
    expected = (logits / temperature).softmax(0).double()
    error = (expected * (1 - expected) / num_draws).sqrt()
    assert drawn[2] == 0
    assert ((drawn / num_draws - expected).abs() <= 4 * error).all()


def test_an_answer_does_not_depend_on_its_batch(model, rows) -> None:
    sampling = Sampling(max_new_tokens=12, seed=3)
    together = sample_tokens(model, PackedBatch.from_rows(rows), sampling)
    assert len({tuple(answer) for [answer] in together}) == len(rows)
    backwards = sample_tokens(model, PackedBatch.from_rows(rows[::-1]), sampling)
    alone = [sample_tokens(model, PackedBatch.from_rows([row]), sampling)[0] for row in rows]
    assert together == backwards[::-1] == alone


def test_seed_answer_and_length_decide_the_draws(model, rows) -> None:
    batch = PackedBatch.from_rows(rows[:1])
    [answers] = sample_tokens(model, batch, Sampling(max_new_tokens=12, answers_per_prompt=4))
    assert len({tuple(answer) for answer in answers}) == 4
    assert [answers[:1]] == sample_tokens(model, batch, Sampling(max_new_tokens=12))
    assert [answers[:1]] != sample_tokens(model, batch, Sampling(max_new_tokens=12, seed=1))
    [[short]] = sample_tokens(model, batch, Sampling(max_new_tokens=5))
    assert short == answers[0][:5], "a longer limit continues the same answer"


def test_an_answer_that_is_cut_off_has_not_ended(model, rows) -> None:
    tokenizer, batch = make_tiny_tokenizer(), PackedBatch.from_rows(rows)
    [[first], *_] = sample_answers(model, tokenizer, batch, Sampling(max_new_tokens=1, temperature=0))
    assert not first.ended
    [[[token]], *_] = sample_tokens(model, batch, Sampling(max_new_tokens=1, temperature=0))
    model.base.generation_config.eos_token_id = [token]
    [[first], *_] = sample_answers(model, tokenizer, batch, Sampling(max_new_tokens=1, temperature=0))
    assert first.ended
