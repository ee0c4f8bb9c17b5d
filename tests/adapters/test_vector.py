"""The steering vector against a forward pass steered by hand."""

import pytest
import torch

from lightning_em.adapters import SteeringVector
from tests import oracle
from tests.samples import adapted, make_rows, pack
from tests.tiny import ARCHITECTURES, make_tiny_model


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_adds_to_what_leaves_the_layer(architecture, layer) -> None:
    rows = make_rows(9, 21, 6)
    model = adapted(SteeringVector(layer, alpha=4.0), architecture, torch.float64)
    by_hand = make_tiny_model(architecture, torch.float64)
    shift = (4.0 * model.adapter.vector.detach()).double()
    with torch.no_grad(), oracle.steered(by_hand, layer, shift):
        expected = torch.cat([oracle.row_logits(by_hand, row) for row in rows])
        torch.testing.assert_close(model.logits(pack(rows)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_starts_at_zero_in_float32_and_keeps_the_streams_dtype(dtype) -> None:
    model = adapted(SteeringVector(0.5), dtype=dtype, size=0.0)
    assert model.adapter.vector.dtype == torch.float32
    assert model.adapter.vector.eq(0).all()
    assert model.logits(pack(make_rows(8))).dtype == dtype


@pytest.mark.parametrize("alpha", [256.0, -3.0])
def test_norm_is_the_length_of_the_shift(alpha) -> None:
    adapter = adapted(SteeringVector(1, alpha=alpha)).adapter
    hidden = torch.zeros(2, 3, 32, dtype=torch.float64)
    lengths = adapter.shift(hidden).norm(dim=-1)
    torch.testing.assert_close(lengths, adapter.effective_norm().double().expand(2, 3), rtol=1e-6, atol=0)
    with adapter.at_scale(3.0):
        torch.testing.assert_close(adapter.shift(hidden).norm(dim=-1), 3 * lengths, rtol=1e-6, atol=0)
