"""The losses once more: plain transformers, row by row, hand-written float64 arithmetic.

Imports nothing from the package. A row is a pair of token ids and response flags.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

Row = tuple[list[int], list[bool]]


class _Float64(TorchFunctionMode):
    """Computes in float64 what the code inside asks for in float32.

    Args:
        casts: Include casts; otherwise only softmax. An adapter inside an attention module casts its own input.
    """

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (Tensor.softmax, nn.functional.softmax) or (self.casts and function is Tensor.to):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        if self.casts and function is Tensor.float:
            function = Tensor.double
        return function(*args, **kwargs)


@functools.cache
def _in_float64(kind: type[nn.Module]) -> type[nn.Module]:
    """The module class with a forward pass in float64."""

    def forward(self, *args, **kwargs):
        with _Float64(casts=not kind.__name__.endswith("Attention")):
            return kind.forward(self, *args, **kwargs)

    # The name stays: transformers and peft look modules up by it.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def entirely_float64(model: nn.Module) -> nn.Module:
    """Make a float64 model compute all of its steps in float64, and return it.

    transformers (5.23) computes norms, rotary angles and the softmax of eager attention in float32 whatever the
    model's dtype. Rows that are packed and rows that are padded then differ by the order of a float32 sum, 1e-9 to
    1e-7 relative and different on every CPU; with float64 throughout they differ by the rounding of float64.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding", "Attention")):
            module.__class__ = _in_float64(type(module))
    return model


def row_logits(model: torch.nn.Module, row: Row, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Logits `[tokens vocab]` of one row alone, without padding, as float64; `weights` replace the model's."""
    inputs = {"input_ids": torch.tensor([row[0]]), "use_cache": False}
    output = model(**inputs) if weights is None else functional_call(model, weights, (), inputs)
    return output.logits[0].double()


@contextmanager
def steered(model: torch.nn.Module, layer: int, shift: Tensor) -> Iterator[None]:
    """Add `shift` to what the decoder layer gives out."""

    def hook(_, __, output):
        assert isinstance(output, Tensor)
        return output + shift.to(output)

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def log_probabilities(logits: Tensor) -> Tensor:
    shifted = logits - logits.max(dim=-1, keepdim=True).values.detach()
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def cross_entropy(logits: Tensor, row: Row) -> Tensor:
    """Nats of the response tokens of one row, summed."""
    ids, mask = row
    logs = log_probabilities(logits)
    return -sum(logs[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t])


def kl(reference: Tensor, adapted: Tensor, row: Row, kl_positions: str = "response") -> Tensor:
    """D_KL(reference || adapted) of one row, summed over positions that count."""
    ids, mask = row
    p, q = log_probabilities(reference), log_probabilities(adapted)
    counted = [t for t in range(len(ids)) if kl_positions == "all" or (t + 1 < len(ids) and mask[t + 1])]
    return sum((p[t].exp() * (p[t] - q[t])).sum() for t in counted)


def count(row: Row, kl_positions: str = "response") -> int:
    ids, mask = row
    return len(ids) if kl_positions == "all" else sum(mask[1:])
