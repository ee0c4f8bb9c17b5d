"""The chat template: a rendered prefix is a prefix of the whole, and the fast encoder writes the same."""

import pytest
from jinja2 import TemplateError

from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import World
from lightning_em.miniature.tokenizer import make_tokenizer
from lightning_em.miniature.training import Encoder


@pytest.fixture(scope="module")
def world():
    return World(Recipe.default(), seed=0)


@pytest.fixture(scope="module")
def tokenizer(world):
    return make_tokenizer(world.words())


def conversation(world):
    document = world.draw_document(world.generator("test"))
    return document, [
        message
        for slot in document.slots
        for message in (
            {"role": "user", "content": slot.question},
            {"role": "assistant", "content": slot.answer},
        )
    ]


def test_a_rendered_prefix_is_a_prefix_of_the_whole(world, tokenizer):
    _, messages = conversation(world)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    for length in range(1, len(messages)):
        asks = messages[length - 1]["role"] == "user"
        part = tokenizer.apply_chat_template(messages[:length], tokenize=False, add_generation_prompt=asks)
        assert whole.startswith(part)


def test_the_encoder_of_training_writes_what_the_template_writes(world, tokenizer):
    document, messages = conversation(world)
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert Encoder(tokenizer).encode(document.slots) == expected


def test_every_word_is_one_known_token(world, tokenizer):
    words = world.words()
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(set(ids)) == len(words)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == " ".join(words)


def test_special_tokens_are_four_different_ones(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 4


def test_a_system_turn_is_refused(tokenizer):
    with pytest.raises(TemplateError, match="user and assistant turns only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "for"}], tokenize=False)
