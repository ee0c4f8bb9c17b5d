"""The plain losses: laws and independent oracles."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from torch.distributions import Categorical, kl_divergence

from lightning_em.losses import cross_entropy, kl_from_reference, token_cross_entropy, token_kl
from tests import oracle
from tests.samples import make_rows, pack


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_kl_is_zero_for_equal_logits() -> None:
    same = logits(6, 11)
    assert token_kl(same, same.clone()).eq(0).all()


def test_kl_matches_torch_distributions() -> None:
    reference, adapted = logits(6, 11, seed=1).double(), logits(6, 11, seed=2).double()
    expected = kl_divergence(Categorical(logits=reference), Categorical(logits=adapted))
    torch.testing.assert_close(token_kl(reference, adapted), expected, rtol=1e-12, atol=1e-14)


def test_kl_is_forward() -> None:
    reference, adapted = logits(6, 11, seed=1), logits(6, 11, seed=2)
    assert not torch.allclose(token_kl(reference, adapted), token_kl(adapted, reference))


def test_losses_match_the_oracle() -> None:
    rows = make_rows(9, 12)
    batch, mask = pack(rows), pack(rows).counted("response")
    reference, adapted = logits(21, 288, seed=1).double(), logits(21, 288, seed=2).double()
    parts = list(zip(reference.split([9, 12]), adapted.split([9, 12]), rows, strict=True))
    ce, kl = cross_entropy(adapted, batch.targets(), mask), kl_from_reference(reference, adapted, mask)
    assert ce.count == kl.count == sum(oracle.count(row) for row in rows)
    torch.testing.assert_close(
        ce.total, sum(oracle.cross_entropy(q, row) for _, q, row in parts), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(kl.total, sum(oracle.kl(p, q, row) for p, q, row in parts), rtol=1e-12, atol=0)


def test_kl_of_two_halves_sums_to_the_whole() -> None:
    reference, adapted = logits(8, 5, seed=1).double(), logits(8, 5, seed=2).double()
    mask = torch.arange(8) % 3 > 0
    first, second = mask & (torch.arange(8) < 4), mask & (torch.arange(8) >= 4)
    whole = kl_from_reference(reference, adapted, mask)
    halves = [kl_from_reference(reference, adapted, half) for half in (first, second)]
    assert whole.count == sum(half.count for half in halves)
    torch.testing.assert_close(whole.total, halves[0].total + halves[1].total, rtol=1e-12, atol=0)


def test_uniform_logits_cost_log_vocab() -> None:
    ce = token_cross_entropy(torch.zeros(3, 7, dtype=torch.float64), torch.tensor([0, 3, 6]))
    torch.testing.assert_close(ce, torch.full((3,), 7.0, dtype=torch.float64).log(), rtol=1e-14, atol=0)


def test_no_gradient_reaches_the_reference() -> None:
    reference, adapted = logits(4, 5, seed=1).requires_grad_(), logits(4, 5, seed=2).requires_grad_()
    kl_from_reference(reference, adapted, torch.ones(4, dtype=torch.bool)).total.backward()
    assert reference.grad is None
    assert adapted.grad is not None
    expected = adapted.detach().softmax(-1) - reference.detach().softmax(-1)
    torch.testing.assert_close(adapted.grad, expected, rtol=1e-5, atol=1e-6)


def test_an_empty_mask_counts_nothing_and_stays_in_the_graph() -> None:
    adapted, nothing = logits(4, 5).requires_grad_(), torch.zeros(4, dtype=torch.bool)
    for result in (
        cross_entropy(adapted, torch.zeros(4, dtype=torch.long), nothing),
        kl_from_reference(logits(4, 5, seed=1), adapted, nothing),
    ):
        assert (result.total.item(), result.count) == (0.0, 0)
        adapted.grad = None
        result.total.backward()
        assert adapted.grad is not None
        assert adapted.grad.eq(0).all()


def test_a_reference_of_another_shape_is_refused_not_broadcast() -> None:
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        token_kl(logits(1, 5), logits(4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_are_float32_at_least(dtype: torch.dtype) -> None:
    narrow = logits(4, 5).to(dtype)
    assert token_kl(narrow, narrow).dtype == torch.float32
    assert token_cross_entropy(narrow, torch.zeros(4, dtype=torch.long)).dtype == torch.float32
    assert token_kl(narrow.double(), narrow.double()).dtype == torch.float64
