"""A sum of losses whose gradient is computed in the forward pass, so that only one part's activations are in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_em.models.fast.fused_head import refuse_second_derivative

PartLoss = Callable[[], Tensor]
"""Computes the per-token losses of one part of a batch."""


def immediate_sum(parts: Sequence[PartLoss], parameters: Sequence[Tensor]) -> Tensor:
    """Sum the values of all parts to a scalar whose backward pass only scales a precomputed gradient.

    Args:
        parts: Losses of the parts. They run one after another; each graph is freed before the next part runs.
        parameters: All parameters that may need a gradient.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not wanted:
        return torch.stack([part().sum() for part in parts]).sum()
    # The parameters are also passed as separate arguments: autograd tracks only tensors that are direct arguments of a
    # Function, not tensors inside a list.
    total: Tensor = _Immediate.apply(parts, wanted, *wanted)  # type: ignore[no-untyped-call]
    return total


class _Immediate(torch.autograd.Function):
    """Computes dL/dp of a scalar loss L in the forward pass; the backward pass multiplies it by the upstream value.

    For a factor c, d(c L)/dp = c dL/dp. Here c is the product of the factors applied to the sum later: loss weight,
    gradient accumulation and number of ranks. Ordinary autograd would keep the activations of all parts until the
    backward pass of the sum.
    """

    @staticmethod
    def forward(ctx: Any, parts: Sequence[PartLoss], parameters: list[Tensor], *_: Tensor) -> Tensor:
        totals: list[Tensor] = []
        # None for a parameter that no part uses; with zeros, checks for parameters without a gradient would miss it
        gradients: list[Tensor | None] = [None for _ in parameters]
        for part in parts:
            # autograd is off inside the forward pass of a Function; turn it on to build the graph of this part
            with torch.enable_grad():
                total = part().sum()
            # frees the graph and the activations of this part before the next part runs
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            for index, own in enumerate(found):
                if own is not None:
                    before = gradients[index]
                    # not in place: autograd may return the same tensor for two parameters
                    gradients[index] = own if before is None else before + own
            totals.append(total.detach())
        # stored on ctx, because save_for_backward is meant for inputs and outputs
        ctx.gradients = gradients
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # one value for each argument of `forward`; None for the two lists
        return None, None, *(None if g is None else upstream[0].to(g.dtype) * g for g in ctx.gradients)
