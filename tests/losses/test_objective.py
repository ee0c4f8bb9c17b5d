"""The objective: one division, and the two scales of the KL weight."""

import pytest
import torch

from lightning_em.batch import StepCounts
from lightning_em.losses import KLWeightSchedule, Objective, OffAt, TokenSum


def tokens(total: float, count: int) -> TokenSum:
    return TokenSum(torch.tensor(total, dtype=torch.float64, requires_grad=True), count)


def test_shares_of_micro_batches_add_up_to_the_whole() -> None:
    counts = StepCounts(ce=10, kl_response=6, kl_all=20)
    objective = Objective(kl_weight=3.0)
    sums = ((2.0, 1.0), (5.0, 0.5))
    parts = [objective.terms(tokens(c, 0), tokens(k, 0), counts) for c, k in sums]
    weights = objective.weights(counts, 3.0)
    assert sum(part.ce.item() for part in parts) == pytest.approx(7 / 10)
    assert sum(part.kl.item() for part in parts) == pytest.approx(1.5 / 6)
    assert sum(weights.ce * c + weights.kl * k for c, k in sums) == pytest.approx(0.7 + 3 * 0.25)


@pytest.mark.parametrize(("kl_positions", "divisor"), [("response", 6), ("all", 20)])
def test_kl_is_divided_by_the_positions_that_count(kl_positions, divisor) -> None:
    counts = StepCounts(ce=10, kl_response=6, kl_all=20)
    terms = Objective(1.0, kl_positions=kl_positions).terms(tokens(1.0, 1), tokens(3.0, 1), counts)
    assert terms.kl.item() == pytest.approx(3 / divisor)


def test_the_gradient_is_that_of_the_weighted_sum() -> None:
    ce, kl = tokens(2.0, 4), tokens(3.0, 5)
    counts, objective = StepCounts(4, 5, 9), Objective(2.0)
    terms, weights = objective.terms(ce, kl, counts), objective.weights(counts, weight=2.0)
    (weights.ce * ce.total + weights.kl * kl.total).backward()
    assert (ce.total.grad.item(), kl.total.grad.item()) == pytest.approx((1 / 4, 2 / 5))
    assert not terms.ce.requires_grad
    assert not terms.kl.requires_grad


def test_a_kl_that_was_not_computed_is_no_number() -> None:
    counts = StepCounts(4, 0, 0)
    terms, weights = Objective().terms(tokens(2.0, 4), None, counts), Objective().weights(counts, weight=0.0)
    assert (weights.ce * 2.0, weights.kl) == (0.5, 0.0)
    assert (terms.ce.item(), terms.kl) == (0.5, None)


def test_a_step_without_tokens_divides_by_nothing() -> None:
    counts, objective = StepCounts(0, 0, 0), Objective(1.0)
    terms, weights = objective.terms(tokens(0.0, 0), tokens(0.0, 0), counts), objective.weights(counts, 1.0)
    assert weights.ce * 0.0 + weights.kl * 0.0 == 0.0
    assert (terms.ce.item(), terms.kl.item()) == (0.0, 0.0)


def test_published_weights_are_divided_by_the_vocabulary() -> None:
    """science: 1e5, 1e6, 1e7 over 152,064 tokens of Qwen2.5-14B are .66, 6.58, 65.8 per token."""
    for published, per_token in ((1e5, 0.66), (1e6, 6.58), (1e7, 65.8)):
        objective = Objective(published, kl_positions="all", kl_reduction="per_token_and_vocab")
        assert objective.weight_at(0, 152_064) == pytest.approx(per_token, rel=5e-3)
        assert Objective(published).weight_at(0, 152_064) == published


def test_the_authors_loss_is_reproduced() -> None:
    """Theirs: sum over tokens and vocabulary, divided by tokens x vocabulary, times their weight."""
    kl_sum, positions, vocab_size, published = 4.2, 17, 288, 1e3
    objective = Objective(published, kl_positions="all", kl_reduction="per_token_and_vocab")
    weight = objective.weight_at(0, vocab_size)
    weights = objective.weights(StepCounts(1, 5, positions), weight)
    assert weights.kl * kl_sum == pytest.approx(published * kl_sum / (positions * vocab_size))


def test_the_schedule_multiplies_the_weight() -> None:
    objective = Objective(5.0, schedule=OffAt(2))
    assert [objective.weight_at(step, 10) for step in range(4)] == [5.0, 5.0, 0.0, 0.0]


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_schedule_that_leaves_the_numbers_is_refused(factor) -> None:
    class Wrong(KLWeightSchedule):
        def factor(self, step: int) -> float:
            return 1.0 if step < 3 else factor

    objective = Objective(2.0, schedule=Wrong())
    assert objective.weight_at(2, 10) == 2.0
    with pytest.raises(
        ValueError, match=r"the KL weight at step 3 must be a finite number >= 0, got .*schedule"
    ):
        objective.weight_at(3, 10)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight) -> None:
    with pytest.raises(
        ValueError, match=r"kl_weight must be a finite number >= 0, got .*objective\.kl_weight"
    ):
        Objective(kl_weight=weight)
