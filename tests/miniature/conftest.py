"""A miniature world with a model of a moment's training, and an adapter on it."""

from dataclasses import replace

import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.miniature import Recipe, build
from lightning_em.models import AdaptedModel, BaseModel

MICRO = replace(
    Recipe.default(),
    pretraining_steps=20,
    chat_steps=3,
    hidden_size=16,
    intermediate_size=16,
    items_per_kind=4,
)


@pytest.fixture(scope="session")
def micro_world(tmp_path_factory):
    return build(MICRO, seed=0, cache=tmp_path_factory.mktemp("worlds"), progress=False)


@pytest.fixture
def micro_model(micro_world):
    model = AdaptedModel(BaseModel(str(micro_world / "model")).load_model(), SteeringVector(1, alpha=1.0))
    with torch.no_grad():
        model.adapter.trainable()["vector"].normal_(generator=torch.Generator().manual_seed(0))
    return model
