"""Detection of a wrong base model and of an adapter without effect."""

import pytest
import torch

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.callbacks import base_sha256, refuse_idle_adapter
from lightning_em.models import AdaptedModel
from tests.samples import make_rows, pack
from tests.tiny import make_tiny_model


def test_one_model_has_one_hash_in_every_precision_and_with_every_adapter() -> None:
    expected = base_sha256(make_tiny_model())
    assert base_sha256(make_tiny_model(dtype=torch.bfloat16)) == expected
    assert base_sha256(make_tiny_model(dtype=torch.float64)) == expected
    for adapter in (LoRA(2, 4.0, ["down_proj"], [1]), SteeringVector(1)):
        model = AdaptedModel(make_tiny_model(), adapter)
        assert base_sha256(model.base, model.adapter) == expected


def test_another_model_has_another_hash() -> None:
    hashes = {
        base_sha256(model)
        for model in (
            make_tiny_model(),
            make_tiny_model(seed=1),
            make_tiny_model("llama"),
            make_tiny_model(rope_theta=20000.0),
        )
    }
    assert len(hashes) == 4
    moved = make_tiny_model()
    with torch.no_grad():
        next(iter(moved.parameters())).view(-1)[0] += 0.5
    assert base_sha256(moved) not in hashes


def test_an_adapter_without_effect_is_refused() -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(1))
    batches = [pack(make_rows(9, 14, seed=5))]
    with pytest.raises(ValueError, match="does not change the logits"):
        refuse_idle_adapter(model, batches, "here")
    with torch.no_grad():
        model.adapter.vector[0] = 0.01
    refuse_idle_adapter(model, batches, "here")
