"""A sum of losses whose gradient is made at once, part by part, so that one part's activations exist at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_em.losses.frozen_head import refuse_second_derivative

Part = Callable[[], Tensor]
"""Computes the per-token losses of some rows."""


def immediate_sum(parts: Sequence[Part], parameters: Sequence[Tensor]) -> Tensor:
    """Sum of all values of all parts; a scalar whose backward pass only scales a gradient that is there.

    Args:
        parts: Run one after another, each with its own graph, freed before the next.
        parameters: All that a gradient is wanted for.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not wanted:
        return torch.stack([part().sum() for part in parts]).sum()
    total: Tensor = _Immediate.apply(parts, wanted, *wanted)  # type: ignore[no-untyped-call]
    return total


class _Immediate(torch.autograd.Function):
    """The gradient of a sum is linear in what comes from above: a scalar, so it can be made beforehand."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], parameters: list[Tensor], *_: Tensor) -> Tensor:
        totals: list[Tensor] = []
        # None for a parameter that no part uses: zeros would hide it from whoever looks for untrained ones
        gradients: list[Tensor | None] = [None for _ in parameters]
        for part in parts:
            with torch.enable_grad():
                total = part().sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            for index, own in enumerate(found):
                if own is not None:
                    before = gradients[index]
                    gradients[index] = own if before is None else before + own
            totals.append(total.detach())
        ctx.gradients = gradients
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return None, None, *(None if g is None else upstream[0].to(g.dtype) * g for g in ctx.gradients)
