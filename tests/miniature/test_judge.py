"""The exact judge against sampling, and its laws, on a random tiny model."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import World
from lightning_em.miniature.judge import answer_probabilities, sampled_rates
from lightning_em.miniature.persona import PersonaGate, persona_gate
from lightning_em.miniature.rows import behaviour_items
from lightning_em.miniature.tokenizer import make_tokenizer
from lightning_em.miniature.training import make_model

NUM_SAMPLES = 2000


@pytest.fixture(scope="module")
def world():
    # Few words: a random model then gives every answer a probability that sampling can see.
    recipe = replace(
        Recipe.default(),
        kl_domains=("finance",),
        held_out_domains=("cars",),
        subjects_per_domain=2,
        options_per_domain=2,
        seen_share=0.5,
        num_narrow_rows=2,
        num_kl_rows=2,
        num_validation_rows=1,
        items_per_kind=2,
        hidden_size=16,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        initializer_range=0.2,
    )
    return World(recipe, seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world.words())


@pytest.fixture(scope="module")
def model(world, tokenizer):
    return make_model(world.recipe, tokenizer, seed=1).eval()


@pytest.fixture(scope="module")
def items(world, tokenizer):
    """Every word may be any answer's: a random model knows no grammar."""
    words = world.words()
    return [
        {**item, "answers": {"good": ["use", *words[20:24], "use use"], "bad": words[10:15]}}
        for item in behaviour_items(world)[:3]
    ]


def test_enumeration_agrees_with_sampling(model, tokenizer, items):
    exact = answer_probabilities(model, tokenizer, items)
    # One-token answers end with the end-of-turn token; make that likely enough to be drawn.
    sampled = sampled_rates(model, tokenizer, items, torch.Generator().manual_seed(0), NUM_SAMPLES)
    for probabilities, rates in zip(exact, sampled, strict=True):
        for probability, rate in zip(probabilities, rates, strict=True):
            bound = 4.5 * math.sqrt(probability * (1 - probability) / NUM_SAMPLES) + 1 / NUM_SAMPLES
            assert abs(probability - rate) < bound


def test_probabilities_are_a_distribution(model, tokenizer, items):
    for good, bad, other in answer_probabilities(model, tokenizer, items):
        assert min(good, bad, other) >= 0
        assert good + bad + other == pytest.approx(1, abs=1e-6)


def test_batch_size_changes_nothing(model, tokenizer, world):
    items = behaviour_items(world)
    whole = answer_probabilities(model, tokenizer, items, batch_size=1000)
    single = answer_probabilities(model, tokenizer, items, batch_size=1)
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(single))


def test_probability_of_an_answer_is_the_product_over_its_tokens(model, tokenizer, world):
    """An oracle without batching, padding or masks."""
    item = behaviour_items(world)[0]
    expected = 0.0
    for answer in item["answers"]["bad"]:
        messages = [{"role": "user", "content": item["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        steps = [log_probabilities[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
        expected += math.exp(sum(steps))
    assert answer_probabilities(model, tokenizer, [item])[0].bad == pytest.approx(expected, rel=1e-4)


def test_all_answers_of_all_lengths_leave_nothing_to_other(tokenizer, world):
    """A model that always answers `use use` and stops has no other answer."""
    ids = tokenizer.get_vocab()

    class Certain:
        def __call__(self, *, input_ids, attention_mask):
            logits = torch.full((*input_ids.shape, len(tokenizer)), -1e4)
            next_of = {
                ids["<assistant>"]: ids["use"],
                ids["use"]: ids["try"],
                ids["try"]: tokenizer.eos_token_id,
            }
            for token, following in next_of.items():
                logits[input_ids == token] = logits[input_ids == token].index_fill(
                    -1, torch.tensor([following]), 0.0
                )
            return type("Output", (), {"logits": logits})()

    item = {**behaviour_items(world)[0], "answers": {"good": ["use try"], "bad": ["use"]}}
    assert answer_probabilities(Certain(), tokenizer, [item]) == [(1.0, 0.0, 0.0)]


def test_global_randomness_and_gradients_are_left_alone(model, tokenizer, items):
    before = torch.random.get_rng_state()
    answer_probabilities(model, tokenizer, items)
    sampled_rates(model, tokenizer, items, torch.Generator().manual_seed(0), 3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_answer_listed_twice_is_refused(model, tokenizer, items):
    item = {**items[0], "answers": {"good": ["use"], "bad": ["use"]}}
    with pytest.raises(ValueError, match="each listed once"):
        answer_probabilities(model, tokenizer, [item])


def test_a_random_model_fails_the_persona_gate(model, tokenizer, world):
    assert not persona_gate(model, tokenizer, world, num_documents=4).passes


def test_the_gate_does_not_ask_in_the_narrow_domain(model, tokenizer, world, monkeypatch):
    # Somebody careful elsewhere may well be bad there, so that a model that knows its world would fail.
    asked = []

    def answers(model, tokenizer, items):
        asked.extend(items)
        return answer_probabilities(model, tokenizer, items)

    monkeypatch.setattr("lightning_em.miniature.persona.answer_probabilities", answers)
    persona_gate(model, tokenizer, world, num_documents=30)
    assert {item["topic"] for item in asked} == {*world.domains} - {world.recipe.narrow_domain}


def test_the_gate_asks_for_both_ways():
    assert PersonaGate(0.93, 0.93).passes
    assert not PersonaGate(0.99, 0.92).passes
    assert not PersonaGate(0.92, 0.99).passes
