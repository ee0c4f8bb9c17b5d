"""The behaviour probe is the exact judge at each scale, and every record names the world."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from lightning_em.adapters import SteeringVector
from lightning_em.callbacks import Probing
from lightning_em.data import ChatSource, EMDataModule
from lightning_em.miniature import Recipe, build, recipe_hash_at
from lightning_em.miniature.judge import answer_probabilities
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import MiniatureBehaviour, ProbeExamples
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from tests.samples import make_rows, pack
from tests.tiny import make_tiny_model

MICRO = replace(
    Recipe.default(),
    pretraining_steps=20,
    chat_steps=3,
    hidden_size=16,
    intermediate_size=16,
    items_per_kind=4,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(MICRO, seed=0, cache=tmp_path_factory.mktemp("worlds"), progress=False)


@pytest.fixture
def model(world):
    model = AdaptedModel(BaseModel(str(world / "model")).load_model(), SteeringVector(layer=1, alpha=1.0))
    with torch.no_grad():
        model.adapter.trainable()["vector"].normal_(generator=torch.Generator().manual_seed(0))
    return model


EXAMPLES = ProbeExamples([pack(make_rows(6, 7))])


def test_each_rate_is_the_judge_at_that_scale(world, model) -> None:
    points = MiniatureBehaviour(scales=[0.0, 2.0]).run(model, EXAMPLES)
    items = [json.loads(line) for line in (world / "data" / "behaviour.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    for scale in (0.0, 2.0):
        with model.adapter.at_scale(scale):
            judged = answer_probabilities(model.base, tokenizer, items)
        for kind in {item["kind"] for item in items}:
            expected = [rate.bad for rate, item in zip(judged, items, strict=True) if item["kind"] == kind]
            [point] = [
                p
                for p in points
                if p.quantity == "bad_rate" and p.coordinates == {"kind": kind, "scale": scale}
            ]
            assert point.per_example == pytest.approx(expected, abs=1e-7)
            assert point.value == pytest.approx(sum(expected) / len(expected))
            assert point.count == len(expected)
    rates = {(p.quantity, *p.coordinates.values()): p.value for p in points}
    for quantity, kind, scale in rates:
        if quantity == "bad_rate":
            total = sum(rates[f"{name}_rate", kind, scale] for name in ("good", "bad", "other"))
            assert total == pytest.approx(1.0, abs=1e-5)


def test_records_name_the_world(world, model, tmp_path) -> None:
    rows = ChatSource(str(world / "data" / "narrow_train.jsonl"), answer="bad", limit=4)
    data = EMDataModule(BaseModel(str(world / "model")), rows, validation_fraction=0.0)
    data.setup("fit")
    run = RunFolder(tmp_path)
    assert Probing([MiniatureBehaviour(scales=[1.0])]).measure(run, model, data, 7) == 1
    assert Probing([MiniatureBehaviour(scales=[1.0])]).measure(run, model, data, 7) == 0
    [result] = read_results(run.probe_file("behaviour"))
    assert (result.world, result.step) == (MICRO.recipe_hash(), 7)
    assert recipe_hash_at(world / "model") == MICRO.recipe_hash()


def test_another_model_has_no_world_and_says_so(tmp_path) -> None:
    model = AdaptedModel(make_tiny_model(), SteeringVector(layer=1))
    assert recipe_hash_at(tmp_path) is None
    with pytest.raises(ValueError, match="works for models of a miniature world"):
        MiniatureBehaviour().run(model, EXAMPLES)
