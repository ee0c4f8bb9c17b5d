"""The logit lens."""

import logging

import pytest
import torch

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import LogitLens, ProbeExamples
from lightning_em.probes.lens import logit_change
from lightning_em.testing import check_probe
from tests.probes.test_scale import EXAMPLES, Normless
from tests.samples import ADAPTERS, adapted
from tests.tiny import ARCHITECTURES, VOCAB_SIZE, make_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_change_by_head_times_norm_weight_times_direction(architecture) -> None:
    base = make_tiny_model(architecture)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    gain = base.model.norm.weight.detach() + (1.0 if architecture.startswith("gemma") else 0.0)
    head = base.lm_head.weight.detach()
    expected = [
        sum(float(head[token, i] * gain[i] * direction[i]) for i in range(32)) for token in range(VOCAB_SIZE)
    ]
    assert logit_change(base, direction).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_vector_on_the_final_norm_does_not_bend_what_it_is_read_with() -> None:
    """It edits the norm's input, and the norm's gain is what the norm makes of ones."""
    model = adapted(ADAPTERS["last_vector"](), size=1.0)
    points = LogitLens(num_tokens=VOCAB_SIZE).measure(model, EXAMPLES)
    vector = model.adapter.vector.detach()
    change = model.base.lm_head.weight.detach() @ (
        model.base.model.norm.weight.detach() * vector / vector.norm()
    )
    found = {p.coordinates["token_id"]: p.value for p in points if p.coordinates["direction"] == "promoted"}
    assert [found[token] for token in range(VOCAB_SIZE)] == pytest.approx(change.tolist(), abs=1e-5)


def test_it_lists_the_extremes_in_order_with_their_text(tiny_model_folder) -> None:
    base = BaseModel(str(tiny_model_folder()))
    model = AdaptedModel(base.load_model(), SteeringVector(1, alpha=4.0))
    model.adapter.vector.data.normal_(generator=torch.Generator().manual_seed(2))
    points = LogitLens(num_tokens=5).run(model, EXAMPLES)
    tokenizer = base.load_tokenizer()
    unit = model.adapter.vector.detach() / model.adapter.vector.detach().norm()
    change = (model.base.lm_head.weight @ (model.base.model.norm.weight * unit))[: len(tokenizer)].tolist()
    ranked = sorted(range(len(change)), key=lambda token: change[token])
    for direction, expected in (("demoted", ranked[:5]), ("promoted", ranked[::-1][:5])):
        found = [p for p in points if p.coordinates["direction"] == direction]
        assert [p.coordinates["token_id"] for p in found] == expected
        assert [p.coordinates["rank"] for p in found] == list(range(5))
        assert [p.value for p in found] == pytest.approx([change[token] for token in expected], rel=1e-4)
        assert [p.coordinates["token"] for p in found] == [tokenizer.decode([token]) for token in expected]
    assert {p.coordinates["site"] for p in points} == {"vector"}


@pytest.mark.parametrize("alpha", [16.0, -16.0])
def test_rank_one_writes_its_column_of_b(alpha) -> None:
    model = adapted(LoRA(1, alpha, ["down_proj"], [0.5]))
    [(site, direction)] = model.adapter.write_directions().items()
    lora_a, lora_b = (p.detach() for p in model.adapter.trainable().values())
    assert site == "model.layers.1.mlp.down_proj"
    expected = abs(alpha) * lora_a.norm() * lora_b[:, 0]
    assert torch.allclose(direction, expected, rtol=1e-4, atol=1e-6)
    assert direction.norm().item() == pytest.approx(model.adapter.effective_norm().item(), rel=1e-4)


@pytest.mark.parametrize(("rslora", "rank"), [(True, 32), (False, 4)])
def test_higher_ranks_write_the_top_singular_vector(rslora, rank) -> None:
    model = adapted(LoRA(rank, 64.0, ["down_proj"], [1], rslora=rslora))
    [direction] = model.adapter.write_directions().values()
    lora_a, lora_b = (p.detach().double() for p in model.adapter.trainable().values())
    change = 64.0 / (rank**0.5 if rslora else rank) * lora_b @ lora_a
    left, values, _ = torch.linalg.svd(change)
    expected = values[0] * left[:, 0]
    expected = expected if expected[expected.abs().argmax()] > 0 else -expected
    assert torch.allclose(direction.double(), expected, rtol=1e-4, atol=1e-6)


def test_only_places_that_write_into_the_stream_count_and_the_largest_are_shown() -> None:
    model = adapted(ADAPTERS["all_linear"]())
    directions = model.adapter.write_directions()
    assert {site.rsplit(".", 1)[-1] for site in directions} == {"o_proj", "down_proj"}
    assert len(directions) == 6
    largest = sorted(directions, key=lambda site: directions[site].norm())[::-1][:2]
    points = LogitLens(num_tokens=1, max_sites=2).run(model, EXAMPLES)
    assert list(dict.fromkeys(p.coordinates["site"] for p in points)) == largest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted(Normless()), "Normless writes no direction into the residual stream"),
        (lambda: adapted(LoRA(2, 4.0, ["q_proj"], [1])), "LoRA writes no direction into the residual stream"),
        (lambda: adapted(ADAPTERS["vector"](), size=0.0), "SteeringVector has no update yet"),
        (lambda: adapted(ADAPTERS["rank_32"](), size=0.0), "LoRA has no update yet"),
    ],
)
def test_an_adapter_without_a_direction_is_skipped_with_a_message(make, message, caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        assert LogitLens().run(make(), ProbeExamples(EXAMPLES.narrow)) == []
    assert message in caplog.text


def test_without_a_tokenizer_tokens_have_numbers(caplog) -> None:
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        points = LogitLens(num_tokens=1).run(adapted(ADAPTERS["vector"]()), EXAMPLES)
    assert "names tokens by number" in caplog.text
    assert all(p.coordinates["token"] == f"#{p.coordinates['token_id']}" for p in points)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0 and 4; set init_args of LogitLens"):
        LogitLens(num_tokens=0)


def test_contract() -> None:
    check_probe(LogitLens(num_tokens=3))
