"""The curves once more: adapters made by hand in plain transformers, every row alone, full logits, float64."""

import math

import numpy as np
import pytest
import torch

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.probes import PerturbationCurve, ProbeExamples, ScaleCurve
from tests.oracle import count, cross_entropy, kl, row_logits, steered
from tests.probes.test_scale import value
from tests.samples import adapted, make_rows, pack
from tests.tiny import make_tiny_model

CE_ROWS, KL_ROWS = [*make_rows(9, 12), *make_rows(7, seed=3)], make_rows(8, 15, seed=5)
EXAMPLES = ProbeExamples([pack(CE_ROWS[:2], "n"), pack(CE_ROWS[2:], "m")], [pack(KL_ROWS, "k")])
LAYER, ALPHA, RANK = 1, 4.0, 2
ADAPTERS = {
    "vector": lambda: SteeringVector(LAYER, alpha=ALPHA),
    "lora": lambda: LoRA(RANK, ALPHA, ["down_proj", "q_proj"], [0, 2]),
    "rslora": lambda: LoRA(RANK, ALPHA, ["down_proj"], [2], rslora=True),
}


@pytest.fixture(params=ADAPTERS)
def case(request):
    """An adapter some steps down the slope, all in float64, and the same thing by hand."""
    model = adapted(ADAPTERS[request.param](), dtype=torch.float64, size=0.0, exact=True)
    optimizer = torch.optim.Adam(model.adapter.trainable().values(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        sum(model.losses(batch, None).ce.total for batch in EXAMPLES.narrow).backward()
        optimizer.step()
    tensors = {name: p.detach().clone() for name, p in model.adapter.trainable().items()}
    return model, ByHand(request.param, tensors)


class ByHand:
    """Trained tensors by their saved names, put into a model that has never heard of adapters."""

    def __init__(self, name: str, trained: dict[str, torch.Tensor]) -> None:
        self.name, self.trained = name, trained
        self.base = make_tiny_model(dtype=torch.float64)
        self.weights = {key: value.detach() for key, value in self.base.named_parameters()}

    def changes(self, tensors, scale=1.0):
        """What is added to each weight of the base, or to the stream."""
        if self.name == "vector":
            return {"stream": scale * ALPHA * tensors["vector"]}
        factor = ALPHA / (math.sqrt(RANK) if self.name == "rslora" else RANK)
        added = {}
        for name, a in tensors.items():
            site, is_a, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
            if is_a:
                b = tensors[name.replace("lora_A", "lora_B")]
                added[f"{site}.weight"] = scale * factor * b @ a
        return added

    def logits(self, rows, tensors, scale=1.0):
        changes = self.changes(tensors, scale)
        with torch.no_grad():
            if self.name == "vector":
                with steered(self.base, LAYER, changes["stream"]):
                    return [row_logits(self.base, row) for row in rows]
            weights = {key: value + changes.get(key, 0) for key, value in self.weights.items()}
            return [row_logits(self.base, row, weights) for row in rows]

    def ce(self, tensors, scale=1.0) -> float:
        logits = self.logits(CE_ROWS, tensors, scale)
        total = sum(cross_entropy(each, row) for each, row in zip(logits, CE_ROWS, strict=True))
        return float(total) / sum(map(count, CE_ROWS))

    def kl(self, tensors, scale, positions) -> float:
        pairs = zip(
            self.logits(KL_ROWS, tensors, 0.0), self.logits(KL_ROWS, tensors, scale), KL_ROWS, strict=True
        )
        total = sum(kl(reference, tuned, row, positions) for reference, tuned, row in pairs)
        return float(total) / sum(count(row, positions) for row in KL_ROWS)

    def norm(self, tensors, other=None) -> float:
        """Of the whole matrices, or of their difference to those of other tensors."""
        there = {} if other is None else self.changes(other)
        squares = [(c - there.get(key, 0)).square().sum() for key, c in self.changes(tensors).items()]
        return math.sqrt(float(sum(squares)))

    def perturbed(self, strength, seed, noise):
        """x' = sqrt(1 - e^2) x + e y; y orthogonal to x and of its norm, for each flattened tensor in turn."""
        drawn = np.random.SeedSequence((seed, noise)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        moved = {}
        for name, tensor in self.trained.items():
            x = tensor.flatten().double()
            y = torch.randn(x.numel(), generator=generator, dtype=torch.float64)
            y = y - (y @ x) / (x @ x) * x
            y = y * (x @ x).sqrt() / (y @ y).sqrt()
            moved[name] = (math.sqrt(1 - strength**2) * x + strength * y).view(tensor.shape)
        return moved


def near(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_perturbation_curve(case) -> None:
    model, by_hand = case
    strengths, seed = [0.1, 0.5, 0.9], 3
    points = PerturbationCurve(strengths, num_seeds=2, seed=seed).run(model, EXAMPLES)
    trained, base = by_hand.ce(by_hand.trained), by_hand.ce(by_hand.trained, scale=0.0)
    assert value(points, "ce_base") == near(base)
    assert value(points, "ce", strength=0.0) == near(trained)
    for e in strengths:
        found: dict[str, list[float]] = {}
        for noise in range(2):
            moved = by_hand.perturbed(e, seed, noise)
            increase = by_hand.ce(moved) - trained
            assert abs(increase) > 1e-5, "a change that is too small to be told from none tests nothing"
            expected = {
                "ce": trained + increase,
                "ce_increase": increase,
                "displacement": by_hand.norm(moved, by_hand.trained),
            }
            for quantity, number in expected.items():
                assert value(points, quantity, strength=e, noise=noise) == near(number)
            expected |= {
                "lost_gain": 100 * increase / (base - trained),
                "relative_increase": increase / trained,
            }
            for quantity, number in expected.items():
                found.setdefault(quantity, []).append(number)
        for quantity, numbers in found.items():
            mean, deviation = np.mean(numbers), np.std(numbers, ddof=1)
            assert value(points, f"{quantity}_mean", strength=e) == near(mean)
            assert value(points, f"{quantity}_sd", strength=e) == near(deviation)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_scale_curve(case, positions) -> None:
    model, by_hand = case
    points = ScaleCurve([0.25, 1.75, 3.0], with_kl=True, kl_positions=positions).run(model, EXAMPLES)
    norm = by_hand.norm(by_hand.trained)
    assert value(points, "effective_norm") == near(norm)
    for scale in (0.0, 0.25, 1.0, 1.75, 3.0):
        for quantity, expected in {
            "ce": by_hand.ce(by_hand.trained, scale),
            "kl": by_hand.kl(by_hand.trained, scale, positions),
        }.items():
            [point] = [p for p in points if p.quantity == quantity and p.coordinates["scale"] == scale]
            assert point.value == near(expected)


def test_efficiency(case) -> None:
    model, by_hand = case
    points = ScaleCurve([0.5]).run(model, EXAMPLES)
    base, trained = by_hand.ce(by_hand.trained, 0.0), by_hand.ce(by_hand.trained)
    norm = by_hand.norm(by_hand.trained)
    for quantity, expected in {
        "efficiency": (base - trained) / norm**2,
        "loss_over_norm2": trained / norm**2,
    }.items():
        [point] = [p for p in points if p.quantity == quantity]
        assert point.value == near(expected)
        assert point.unit == "nats_per_token_per_squared_norm"
        assert point.coordinates == {}
