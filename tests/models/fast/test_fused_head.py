import pytest
import torch

from lightning_em.losses import token_cross_entropy, token_kl
from lightning_em.models.fast.fused_head import FrozenHead, head_cross_entropy, head_kl

VOCAB, HIDDEN, TOKENS = 301, 24, 37


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(dtype=torch.float64, bias=False, logit_scale=1.0, soft_cap=None, chunk_bytes=None):
    return FrozenHead(
        weight=randn(VOCAB, HIDDEN, seed=1).to(dtype),
        bias=randn(VOCAB, seed=2).to(dtype) if bias else None,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
        chunk_bytes=chunk_bytes,
    )


def naive_logits(head, hidden):
    logits = hidden @ head.weight.to(hidden.dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(hidden.dtype)
    logits = logits * head.logit_scale
    return logits if head.soft_cap is None else torch.tanh(logits / head.soft_cap) * head.soft_cap


def states(size, dtype=torch.float64):
    reference = randn(TOKENS, HIDDEN, seed=3)
    return reference.to(dtype), (reference + size * randn(TOKENS, HIDDEN, seed=4)).to(dtype)


HEADS = [
    {},
    {"bias": True},
    {"logit_scale": 0.25},
    {"soft_cap": 3.0},
    {"bias": True, "logit_scale": 0.5, "soft_cap": 5.0},
    {"chunk_bytes": 5 * VOCAB * 8},
    {"chunk_bytes": 1},
]
TARGETS = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_values_and_gradients_equal_the_plain_losses_in_float64(fields):
    head = made(**fields)
    reference, hidden = states(0.3)
    weights = randn(TOKENS, seed=6)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    for fused, plain in (
        (head_cross_entropy(head, ours, TARGETS), token_cross_entropy(naive_logits(head, theirs), TARGETS)),
        (
            head_kl(head, reference, ours),
            token_kl(naive_logits(head, reference), naive_logits(head, theirs)),
        ),
    ):
        torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-13)
        (got,) = torch.autograd.grad((fused * weights).sum(), ours)
        (expected,) = torch.autograd.grad((plain * weights).sum(), theirs)
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_values_without_gradient_equal_those_with(fields):
    head = made(torch.float32, **fields)
    reference, hidden = states(0.3, torch.float32)
    tracked = hidden.clone().requires_grad_()
    assert torch.equal(head_kl(head, reference, hidden), head_kl(head, reference, tracked).detach())
    torch.testing.assert_close(
        head_cross_entropy(head, hidden, TARGETS), head_cross_entropy(head, tracked, TARGETS).detach()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fields", HEADS, ids=str)
def test_equal_states_give_exactly_zero(dtype, fields):
    head = made(dtype, **fields)
    reference, _ = states(0.0, dtype)
    hidden = reference.clone().requires_grad_()
    values = head_kl(head, reference, hidden)
    values.sum().backward()
    assert (values == 0).all()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("nats", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("fields", HEADS[:5], ids=str)
def test_bf16_gradient_is_within_one_percent_at_a_small_kl(fields, nats):
    head = made(torch.bfloat16, **fields)
    reference = states(0.0)[0].bfloat16()
    size = 1.0
    for _ in range(20):  # find the distance that gives this KL, in bf16 as the model would
        hidden = (reference.double() + size * randn(TOKENS, HIDDEN, seed=4)).bfloat16()
        exact = hidden.double().requires_grad_()
        kl = token_kl(naive_logits(head, reference.double()), naive_logits(head, exact)).mean()
        size *= (nats / float(kl.detach())) ** 0.5
    assert 0.2 * nats < kl < 5 * nats
    (expected,) = torch.autograd.grad(kl, exact)
    tracked = hidden.clone().requires_grad_()
    values = head_kl(head, reference, tracked).mean()
    (got,) = torch.autograd.grad(values, tracked)
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() <= 0.01 * expected.norm()
    torch.testing.assert_close(values.detach().double(), kl.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_float32_error_is_no_more_than_twice_that_of_the_plain_loss(size):
    head, exact_head = made(torch.float32), made()
    reference, hidden = (each.float() for each in states(size))
    exact = hidden.double().requires_grad_()
    wide = FrozenHead(head.weight.double())
    expected = token_kl(naive_logits(wide, reference.double()), naive_logits(wide, exact))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    errors = []
    for loss in (
        lambda state: token_kl(naive_logits(head, reference), naive_logits(head, state)),
        lambda state: head_kl(head, reference, state),
    ):
        tracked = hidden.clone().requires_grad_()
        values = loss(tracked)
        (gradient,) = torch.autograd.grad(values.sum(), tracked)
        errors.append(((values - expected).norm().item(), (gradient - expected_gradient).norm().item()))
    (plain_value, plain_gradient), (value, gradient) = errors
    assert value <= 2 * plain_value
    assert gradient <= 2 * plain_gradient
    assert exact_head.compute_dtype == torch.float64


def test_a_kl_over_a_large_vocabulary_has_no_bias_from_the_softmax():
    """On a CPU, torch's float32 softmax over 49,152 entries sums to 1 + 2e-5; times E_p[z], that was an error."""
    head = FrozenHead(weight=randn(49152, HIDDEN, seed=1).float())
    reference, _ = states(0.0, torch.float32)
    hidden = (1.2 * reference).requires_grad_()  # raises the likely tokens
    exact = hidden.detach().double().requires_grad_()
    expected = token_kl(naive_logits(head, reference.double()), naive_logits(head, exact))
    got = head_kl(head, reference, hidden)
    torch.testing.assert_close(got.double(), expected, rtol=5e-5, atol=0)
    assert abs(got.double().sum() / expected.sum() - 1) <= 5e-6
    (own,) = torch.autograd.grad(got.sum(), hidden)
    (other,) = torch.autograd.grad(expected.sum(), exact)
    assert (own.double() - other).norm() <= 2e-5 * other.norm()


@pytest.mark.parametrize("factor", [30.0, 300.0, 3000.0])
def test_models_far_apart_stay_finite_and_right(factor):
    head = made(torch.float32)
    reference, hidden = (factor * each for each in states(2.0, torch.float32))
    tracked, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    wide = FrozenHead(head.weight.double())
    values = head_kl(head, reference, tracked)
    expected = token_kl(naive_logits(wide, reference.double()), naive_logits(wide, exact))
    torch.testing.assert_close(values.detach().double(), expected.detach(), rtol=1e-4, atol=1e-3)
    (gradient,) = torch.autograd.grad(values.sum(), tracked)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert (gradient - expected_gradient).norm() <= 1e-3 * expected_gradient.norm()


def test_no_gradient_reaches_head_or_reference():
    weight = made().weight.clone().requires_grad_()
    reference, hidden = (each.requires_grad_() for each in states(0.3))
    (
        head_kl(FrozenHead(weight), reference, hidden).sum()
        + head_cross_entropy(FrozenHead(weight), hidden, TARGETS).sum()
    ).backward()
    assert weight.grad is None
    assert reference.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("power", [1, 2])  # whether or not what comes from above has a gradient itself
@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_second_derivatives_are_refused(kind, power):
    reference, hidden = states(0.3)
    hidden.requires_grad_()
    values = (
        head_cross_entropy(made(), hidden, TARGETS) if kind == "ce" else head_kl(made(), reference, hidden)
    )
    with pytest.raises(ValueError, match="makes its gradients in the forward pass"):
        torch.autograd.grad(values.sum() ** power, hidden, create_graph=True)


def test_nothing_counted_gives_nothing():
    head = made()
    hidden = torch.zeros(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    values = head_cross_entropy(head, hidden, TARGETS[:0])
    values.sum().backward()
    assert values.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("num_tokens", [1, 2, 37, 130, 1000])
def test_chunks_cover_each_token_once_and_none_is_one_row(num_tokens):
    head = made(chunk_bytes=1)
    parts = list(head.chunks(num_tokens))
    assert [row for part in parts for row in range(num_tokens)[part]] == list(range(num_tokens))
    assert all(part.stop - part.start >= min(num_tokens, 2) for part in parts)


def test_logits_are_float32_for_a_bf16_head():
    head = made(torch.bfloat16, bias=True)
    hidden = states(0.0)[0].bfloat16()
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), naive_logits(head, hidden.double()), rtol=1e-5, atol=1e-5)
