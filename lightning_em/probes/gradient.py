"""Gradients of both losses with respect to the adapter's parameters, and their norms."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_em.batch import CountedPositions, PackedBatch
from lightning_em.losses import TokenSum
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.records import Point, Quantity

_NAMES = ("ce_gradient_norm", "kl_gradient_norm")
_UNIT = "nats_per_token_per_unit"


class GradientNorm(Probe):
    """Norm of the gradient of each loss with respect to the adapter's parameters, at the checkpoint.

    The losses are means over all counted tokens of the probe rows, as in training, without the KL weight.

    Points: `ce_gradient_norm`, and `kl_gradient_norm` if there are KL rows. Each is given over all parameters
    and by `tensor`. The unit is nats per token for a step of length 1 in parameter space. Do not compare
    adapters of different types: their parametrizations differ.

    Args:
        kl_positions: Positions that count in the KL; set it as in training.
    """

    name = "gradient"
    quantities = (
        *(Quantity(name, _UNIT, in_study="every") for name in _NAMES),
        *(Quantity(name, _UNIT, ("tensor",), in_study="none") for name in _NAMES),
    )
    needs_gradients = True

    def __init__(self, kl_positions: CountedPositions = "response") -> None:
        self.kl_positions = kl_positions

    def settings(self) -> Mapping[str, Any]:
        return {"kl_positions": self.kl_positions}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        points = _norms("ce_gradient_norm", ce_gradient(model, examples.narrow))
        if examples.kl:
            points += _norms("kl_gradient_norm", kl_gradient(model, examples.kl, self.kl_positions))
        return points


def ce_gradient(model: AdaptedModel, batches: Sequence[PackedBatch]) -> dict[str, Tensor]:
    """Compute the gradient of the mean cross-entropy per token over all batches, at scale 1.

    Args:
        model: Model to differentiate; its `.grad` fields are not written.
        batches: Rows with responses.

    Returns:
        The gradient of each adapter parameter by name, in the parameter's shape, float64 on the CPU.
    """
    return _mean_gradient(model, [partial(_ce, model, batch) for batch in batches])


def kl_gradient(
    model: AdaptedModel, batches: Sequence[PackedBatch], kl_positions: CountedPositions = "response"
) -> dict[str, Tensor]:
    """Compute the gradient of the mean KL per token from the reference; see `ce_gradient`."""
    return _mean_gradient(model, [partial(_kl, model, batch, kl_positions) for batch in batches])


def _ce(model: AdaptedModel, batch: PackedBatch) -> TokenSum:
    return model.losses(batch, None).ce


def _kl(model: AdaptedModel, batch: PackedBatch, kl_positions: CountedPositions) -> TokenSum:
    return model.kl_sum(batch, kl_positions)


def _mean_gradient(model: AdaptedModel, losses: Sequence[partial[TokenSum]]) -> dict[str, Tensor]:
    own = model.adapter.trainable()
    # sum over batches and divide once by all tokens, so that the split into batches does not matter
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in own.items()}
    count = 0
    for loss in losses:
        with torch.enable_grad():
            term = loss()
            found = torch.autograd.grad(term.total, list(own.values()), allow_unused=True)
        count += int(term.count)
        for name, gradient in zip(own, found, strict=True):
            if gradient is not None:
                sums[name] += gradient.detach().double().cpu()
    if count == 0:
        raise ValueError("there is no token to take a gradient of; give the probe at least one example.")
    return {name: total / count for name, total in sums.items()}


def _norms(quantity: str, gradient: Mapping[str, Tensor]) -> list[Point]:
    squares = {name: float(tensor.square().sum()) for name, tensor in gradient.items()}
    points = [Point(quantity, sum(squares.values()) ** 0.5, _UNIT)]
    return points + [Point(quantity, value**0.5, _UNIT, {"tensor": name}) for name, value in squares.items()]
