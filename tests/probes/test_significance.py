"""Pre-training significance."""

import logging

import pytest
import torch

from lightning_em.adapters import SteeringVector
from lightning_em.models import AdaptedModel, BaseModel
from lightning_em.probes import PretrainingSignificance
from lightning_em.testing import check_probe
from tests.oracle import kl, row_logits, steered
from tests.probes.test_scale import EXAMPLES, Normless
from tests.samples import ADAPTERS, adapted
from tests.tiny import make_tiny_model, write_rows

TEXTS = ["The garden is wide and the tea is warm.", "Rain again, so we read.", "Soup, then chess."]


@pytest.fixture
def file(tmp_path):
    return str(write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS]))


@pytest.fixture
def model(tiny_model_folder):
    model = AdaptedModel(BaseModel(str(tiny_model_folder())).load_model(), SteeringVector(1, alpha=4.0))
    model.adapter.vector.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def grid_of(points):
    return {
        (p.coordinates["direction"], p.coordinates["draw"], p.coordinates["norm_ratio"]): p.value
        for p in points
        if p.quantity == "kl"
    }


def divergence(texts, tokenizer, shift, max_tokens=128):
    """Nats per token over all positions: plain transformers, text by text, float64."""
    plain, total, count = make_tiny_model(), 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_tokens]
        row = (ids, [True] * len(ids))
        with torch.no_grad():
            reference = row_logits(plain, row)
            with steered(plain, 1, shift):
                total += kl(reference, row_logits(plain, row), row, "all").item()
        count += len(ids)
    return total / count


def test_trained_and_random_directions_at_each_norm(model, file, tiny_tokenizer) -> None:
    probe = PretrainingSignificance(file, max_tokens=20, num_draws=2, norm_ratios=[2.0, 0.5])
    points = probe.run(model, EXAMPLES)
    values = grid_of(points)
    trained = 4.0 * model.adapter.vector.detach()
    norm = next(p.value for p in points if p.quantity == "effective_norm")
    assert norm == pytest.approx(trained.norm().item())
    assert set(values) == {
        (direction, draw, ratio)
        for direction, draw in (("adapter", 0), ("random", 0), ("random", 1))
        for ratio in (0.5, 2.0)
    }
    for ratio in (0.5, 2.0):
        expected = divergence(TEXTS, tiny_tokenizer, ratio * trained, 20)
        assert values["adapter", 0, ratio] == pytest.approx(expected, rel=1e-3)
        for draw in range(2):
            with probe._random(model, draw, ratio * norm):
                shift = model.adapter.scale * 4.0 * model.adapter.vector.detach()
            assert shift.norm().item() == pytest.approx(ratio * norm, rel=1e-5)
            assert abs(torch.cosine_similarity(shift, trained, dim=0).item()) < 1e-5
            expected = divergence(TEXTS, tiny_tokenizer, shift, 20)
            assert values["random", draw, ratio] == pytest.approx(expected, rel=1e-3)
    assert len({values["random", draw, 2.0] for draw in range(2)}) == 2
    assert all(p.per_example is None for p in points)


@pytest.mark.parametrize("name", ADAPTERS)
def test_random_updates_have_the_norm_asked_for(name) -> None:
    model = adapted(ADAPTERS[name]())
    norm = model.adapter.effective_norm().item()
    before = {key: p.detach().clone() for key, p in model.adapter.trainable().items()}
    with PretrainingSignificance("unread.txt")._random(model, 0, 1.5 * norm):
        found = abs(model.adapter.scale) * model.adapter.effective_norm().item()
        assert found == pytest.approx(1.5 * norm, rel=1e-4)
        for key, parameter in model.adapter.trainable().items():
            cosine = torch.cosine_similarity(parameter.flatten(), before[key].flatten(), dim=0)
            assert abs(cosine.item()) < 1e-4
    assert all(torch.equal(p, before[key]) for key, p in model.adapter.trainable().items())
    assert model.adapter.scale == 1.0


def test_random_directions_are_those_of_seed_and_draw(model, file) -> None:
    few = grid_of(PretrainingSignificance(file, num_draws=1).run(model, EXAMPLES))
    many = grid_of(PretrainingSignificance(file, num_draws=3, norm_ratios=[1.0]).run(model, EXAMPLES))
    other = grid_of(PretrainingSignificance(file, num_draws=1, seed=1).run(model, EXAMPLES))
    assert few["random", 0, 1.0] == many["random", 0, 1.0] != other["random", 0, 1.0]
    assert few["adapter", 0, 1.0] == other["adapter", 0, 1.0]


def test_paragraphs_of_a_text_file_do_as_well(model, file, tmp_path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n\n", encoding="utf-8")
    lines = PretrainingSignificance(file, num_draws=1).run(model, EXAMPLES)
    assert PretrainingSignificance(str(tmp_path / "texts.txt"), num_draws=1).run(model, EXAMPLES) == lines


@pytest.mark.parametrize(("adapter", "what"), [(Normless, ""), (ADAPTERS["vector"], " yet")])
def test_an_adapter_without_a_norm_is_skipped_with_a_message(adapter, what, caplog) -> None:
    size = 0.0 if what else 0.05
    with caplog.at_level(logging.INFO, "lightning_em.probes"):
        assert PretrainingSignificance("unread.txt").run(adapted(adapter(), size=size), EXAMPLES) == []
    assert f"has no effective norm{what}: significance has nothing to compare" in caplog.text


def test_what_it_needs_is_said(model, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no such file .*set init_args\.text of PretrainingSignificance"):
        PretrainingSignificance(str(tmp_path / "none.txt")).run(model, EXAMPLES)
    for content, message in (
        ('{"text": "a"}\n{"words": 1}\n', r"x\.jsonl:2: expected an object with a string `text`"),
        ('{"text": "a"}\nnot json\n', r"x\.jsonl:2: not JSON at column 1"),
        ("\n", "holds no text"),
    ):
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            PretrainingSignificance(str(tmp_path / "x.jsonl")).run(model, EXAMPLES)
    with pytest.raises(ValueError, match=r"got 0, 5, 16, 128 and 0; set init_args"):
        PretrainingSignificance("x.txt", num_texts=0)
    with pytest.raises(ValueError, match=r"norm_ratios must be positive.*got \[-1\.0\]"):
        PretrainingSignificance("x.txt", norm_ratios=[-1.0])


def test_contract(model, file) -> None:
    check_probe(PretrainingSignificance(file, num_draws=1, norm_ratios=[1.0]), model, EXAMPLES)
