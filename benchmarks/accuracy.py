"""Rounding errors of a step on a real model: `python -m benchmarks.accuracy --help`.

CE, KL and gradient in float32, of the plain and of the fast backend, against those of the plain backend in float64.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.peers import Ours
from benchmarks.shapes import ADAPTERS, SHAPES, SMOLLM2, Shape, describe, step_batches
from lightning_em.batch import PackedBatch
from lightning_em.logs import filter_expected_messages
from lightning_em.models import ActivationStore, StoreOptions

PLAIN, FAST, CACHED = "plain", "fast", "fast, prefix and reference cached"
_CPU = torch.device("cpu")


class Errors(NamedTuple):
    """Relative errors of a step. CE and KL are apart, since their errors can cancel in the loss."""

    ce: float
    kl: float
    gradient: float


def rounding_errors(shape: Shape, kind: str, ce: PackedBatch, kl: PackedBatch) -> dict[str, Errors]:
    """Relative errors in float32, by implementation."""
    oracle = Ours(shape, kind, _CPU, backend="plain", dtype=torch.float64)
    _normalize_in_float64(oracle.model.base)
    exact = _step(oracle, ce, kl)
    make_store = partial(ActivationStore, StoreOptions(device_gib=1.0))
    float32 = {
        PLAIN: partial(Ours, backend="plain"),
        FAST: Ours,
        CACHED: partial(Ours, make_store=make_store, reference="cached"),
    }
    return {
        name: Errors(
            *(
                float((own - other).norm() / other.norm())
                for own, other in zip(_step(make(shape, kind, _CPU), ce, kl), exact, strict=True)
            )
        )
        for name, make in float32.items()
    }


def _step(peer: Ours, ce: PackedBatch, kl: PackedBatch) -> list[Tensor]:
    """CE, KL and gradient of a step in float64."""
    loss = peer.step_loss(ce, kl)
    assert loss.kl is not None
    gradients = torch.autograd.grad(loss.total, peer.parameters)
    parts = (loss.ce.total, loss.kl.total, torch.cat([gradient.flatten() for gradient in gradients]))
    return [part.detach().double() for part in parts]


def _normalize_in_float64(model: nn.Module) -> None:
    """Replace the norms of Llama and Qwen2: in transformers 5.23 they compute in float32 for every dtype."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default=SMOLLM2.name, choices=list(SHAPES))
    parser.add_argument("--adapter", nargs="+", default=["vector", "lora_five", "lora_all"], choices=ADAPTERS)
    parser.add_argument("--rows", type=int, default=2, help="rows of each stream")
    arguments = parser.parse_args(args)
    filter_expected_messages()
    shape = SHAPES[arguments.shape]
    ce, kl = step_batches(arguments.rows, shape)
    table = Table(title=f"{shape.name}, relative errors (x plain): {describe(ce, kl)}")
    for column in ("adapter", "float32", "CE", "KL", "gradient"):
        table.add_column(column, justify="left" if column in ("adapter", "float32") else "right")
    for kind in arguments.adapter:
        errors = rounding_errors(shape, kind, ce, kl)
        for name, own in errors.items():
            cells = (f"{one:.1e} ({one / plain:.2f})" for one, plain in zip(own, errors[PLAIN], strict=True))
            table.add_row(kind, name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
