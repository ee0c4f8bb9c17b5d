"""The losses once more: plain transformers, row by row, hand-written float64 arithmetic.

Imports nothing from the package. A row is a pair of token ids and response flags.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

Row = tuple[list[int], list[bool]]


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
