"""Training a world: a short build gives the loss that it gave elsewhere, so a change of the recipe's code is seen."""

from dataclasses import replace

import pytest
import torch

from lightning_em.miniature import Recipe
from lightning_em.miniature.corpus import World
from lightning_em.miniature.tokenizer import make_tokenizer
from lightning_em.miniature.training import Encoder, Stage, train


@pytest.mark.slow
def test_a_short_build_reaches_the_same_loss_on_every_cpu():
    """4.71221 with AVX2 kernels, 4.71221 with ATen's default ones (2026-11-29); 6.3 before training.

    Forty steps in float32 have moved roundings of 1e-7 to 2e-6. The tolerance leaves a factor of a hundred and is
    smaller than what a change of a learning rate by one percent does.
    """
    recipe = replace(Recipe.default(), pretraining_steps=40, chat_steps=4, documents_per_batch=8)
    world = World(recipe, 0)
    tokenizer = make_tokenizer(world.words())
    model = train(world, tokenizer, recipe.pretraining_steps, progress=False)
    documents, encoder = world.generator("documents/held_out"), Encoder(tokenizer)
    ids = torch.tensor([encoder.encode(world.draw_document(documents).slots) for _ in range(32)])
    with torch.no_grad():
        loss = Stage(model, recipe, [], lambda step: 1.0)._document_loss(ids, first_slot=0)
    assert loss.item() == pytest.approx(4.71221, abs=2e-4)
