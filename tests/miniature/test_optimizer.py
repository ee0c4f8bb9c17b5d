"""Muon in float32: torch's rule, with the orthogonalization held to singular values in float64."""

import pytest
import torch
from torch.optim import Muon

from lightning_em.miniature.optimizer import Float32Muon, orthogonalize

SHAPES = [(8, 8), (4, 12), (12, 4), (4, 12)]


def matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 12), (2, 12, 4)])
def test_orthogonalization_acts_on_singular_values_alone(shape):
    """Independent oracle: the quintic applied five times to each singular value, in float64."""
    given = matrices(*shape)
    u, values, vh = torch.linalg.svd(given.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonalize(given)
    assert found.dtype == torch.float32
    # A few hundred float32 operations on values of size 1.
    torch.testing.assert_close(found.double(), u @ torch.diag_embed(values) @ vh, rtol=0, atol=2e-5)


def test_a_matrix_does_not_depend_on_its_batch():
    alone, together = orthogonalize(matrices(1, 8, 8)), orthogonalize(matrices(3, 8, 8))
    first = orthogonalize(matrices(3, 8, 8)[:1])
    torch.testing.assert_close(first, together[:1], rtol=0, atol=1e-5)
    assert alone.shape == first.shape


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_steps_are_those_of_torch_up_to_its_bfloat16():
    """bfloat16 keeps eight bits: five iterations are off by a few percent of an update."""
    ours, theirs = ([torch.nn.Parameter(matrices(*shape, seed=9)) for shape in SHAPES] for _ in range(2))
    optimizers = [
        kind(parameters, lr=0.1, weight_decay=0.05, momentum=0.95)
        for kind, parameters in ((Float32Muon, ours), (Muon, theirs))
    ]
    for step in range(4):
        for parameters in (ours, theirs):
            for index, parameter in enumerate(parameters):
                parameter.grad = matrices(*parameter.shape, seed=10 * step + index)
        for optimizer in optimizers:
            optimizer.step()
    for shape, own, other in zip(SHAPES, ours, theirs, strict=True):
        moved = (other - matrices(*shape, seed=9)).norm()
        assert 0 < (own - other).norm() < 0.05 * moved


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(matrices(4, 4))
    optimizer = Float32Muon([parameter], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(parameter, matrices(4, 4))
