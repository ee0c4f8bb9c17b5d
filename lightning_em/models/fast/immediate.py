"""A sum of losses whose gradient is made in the forward pass, part by part: one part's activations exist at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_em.models.fast.fused_head import refuse_second_derivative

PartLoss = Callable[[], Tensor]
"""Computes the per-token losses of some rows."""


def immediate_sum(parts: Sequence[PartLoss], parameters: Sequence[Tensor]) -> Tensor:
    """Sum of all values of all parts, a scalar whose backward pass only scales a gradient that is already there.

    Args:
        parts: Run one after another, each with its own graph, freed before the next.
        parameters: Everything that needs a gradient.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not torch.is_grad_enabled() or not wanted:
        return torch.stack([part().sum() for part in parts]).sum()
    # The parameters are passed once more as plain arguments: autograd connects a Function only to tensors that are
    # arguments themselves, not to those inside a list.
    total: Tensor = _Immediate.apply(parts, wanted, *wanted)  # type: ignore[no-untyped-call]
    return total


class _Immediate(torch.autograd.Function):
    """d(c L)/dp = c dL/dp for a scalar L: dL/dp can be made in the forward pass, and c arrives in the backward pass.

    c holds the weight of the loss, accumulation and the number of ranks. Ordinary autograd would keep the
    activations of every part until the backward pass of the sum.
    """

    @staticmethod
    def forward(ctx: Any, parts: Sequence[PartLoss], parameters: list[Tensor], *_: Tensor) -> Tensor:
        totals: list[Tensor] = []
        # None for a parameter that no part uses: zeros would hide it from a check for parameters without a gradient
        gradients: list[Tensor | None] = [None for _ in parameters]
        for part in parts:
            # autograd is off inside the forward pass of a Function
            with torch.enable_grad():
                total = part().sum()
            # frees the graph of this part, and with it the activations, before the next part runs
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            for index, own in enumerate(found):
                if own is not None:
                    before = gradients[index]
                    # a new tensor: autograd may have given the same one for two parameters
                    gradients[index] = own if before is None else before + own
            totals.append(total.detach())
        # on ctx and not in save_for_backward, which is for inputs and outputs
        ctx.gradients = gradients
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # one value for each argument of `forward`: none for the two lists
        return None, None, *(None if g is None else upstream[0].to(g.dtype) * g for g in ctx.gradients)
