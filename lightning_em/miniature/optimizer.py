"""Muon with its Newton-Schulz iteration in float32, whatever the CPU."""

from collections import defaultdict
from collections.abc import Callable
from math import sqrt
from typing import overload

import torch
from torch import Tensor
from torch.optim import Muon
from torch.optim.optimizer import ParamsT

# Coefficients of the quintic, Keller Jordan's Muon post (https://kellerjordan.github.io/posts/muon/); the slope at
# zero is as large as it can be, singular values end between about .7 and 1.2 instead of at 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS, _EPSILON = 5, 1e-7


class Float32Muon(Muon):
    """`torch.optim.Muon` with the orthogonalization in float32 and batched over matrices of one shape.

    torch 2.13 casts the gradient to bfloat16 (`torch/optim/_muon.py`, `_zeropower_via_newtonschulz`) and has no
    argument for it. A CPU without bfloat16 instructions takes 7 to 12 times as long for such a product as for a
    float32 one, and its rounding differs between kernels: after a thousand steps another CPU has trained another
    model. State and update rule are those of torch's Muon with its other arguments at their defaults.

    Args:
        params: Matrices to optimize.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Momentum factor, Nesterov's.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one optimizer step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_alike(parameters, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _step_alike(self, parameters: list[Tensor], lr: float, weight_decay: float, momentum: float) -> None:
        """Update matrices of one shape."""
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))  # Nesterov
        rows, columns = parameters[0].shape
        scaled_lr = lr * sqrt(max(1, rows / columns))
        for parameter, update in zip(parameters, orthogonalize(torch.stack(updates)), strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-scaled_lr)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move the singular values of each matrix close to 1 by Newton-Schulz iterations in float32.

    Args:
        matrices: (count, rows, columns).

    Returns:
        The same shape, float32; singular vectors are those of the input.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.float()
    if is_tall:
        x = x.mT  # the Gram matrix is then the smaller one
    # The Frobenius norm bounds the spectral norm: no singular value starts above 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if is_tall else x
