"""Time a sweep whose runs share the activations of the frozen base model: `python -m benchmarks.sweep --help`.

The sweep trains a steering vector for each KL weight and seed, to choose the weight. Each run is one epoch of
micro-batches of 2 narrow and 8 KL rows, the defaults of the data module. Then it measures CE and KL on held-out rows,
a tenth as many, by which the weight is chosen. All runs have the same rows; their order depends on the seed.
"""

import argparse
import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, Shape, chat_like, describe, make_adapter
from benchmarks.timing import clock, wall_clock
from lightning_em.batch import PackedBatch
from lightning_em.losses import LossWeights
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions

CE_ROWS, KL_ROWS, VALIDATION_SHARE = 2, 8, 0.1
KL_WEIGHTS, SEEDS = (0.3, 1.0, 3.0, 10.0), (0, 1)
SHARED, OWN = "one store on disk for all", "a cold store on disk for each"


class Seconds(NamedTuple):
    """Duration of a run.

    Attributes:
        own: CPU time, which other processes hardly affect; wall-clock time on a GPU.
        wall: Wall-clock time.
    """

    own: float
    wall: float


class Rows(NamedTuple):
    """Training rows and held-out rows of both streams."""

    ce: PackedBatch
    kl: PackedBatch
    held_out_ce: PackedBatch
    held_out_kl: PackedBatch

    @classmethod
    def make(cls, num_steps: int, vocab_size: int, device: torch.device) -> "Rows":
        """Make the rows for one epoch of `num_steps` steps."""
        generator = torch.Generator().manual_seed(0)
        train = (num_steps * CE_ROWS, num_steps * KL_ROWS)
        sizes = (*train, *(max(1, round(VALIDATION_SHARE * size)) for size in train))
        return cls(*(chat_like(size, vocab_size, generator).to(device) for size in sizes))


@dataclass(frozen=True)
class Run:
    """One fit of the sweep.

    Attributes:
        kl_weight: Factor on the KL.
        seed: Seed of the order of the rows and of the adapter.
    """

    kl_weight: float
    seed: int

    def __call__(self, model: AdaptedModel, rows: Rows) -> Tensor:
        """Train for one epoch and measure on the held-out rows; returns adapter and losses as one vector."""
        parameters = list(model.adapter.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.seed)
        steps = rows.ce.num_rows // CE_ROWS
        orders = [torch.randperm(part.num_rows, generator=generator) for part in (rows.ce, rows.kl)]
        for ce, kl in zip(orders[0].chunk(steps), orders[1].chunk(steps), strict=True):
            batches = rows.ce.select(ce.tolist()), rows.kl.select(kl.tolist())
            counts = [int(batch.counted("response").sum()) for batch in batches]
            loss = model.step_loss(*batches, LossWeights(1 / counts[0], self.kl_weight / counts[1])).total
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        found = [parameter.detach().flatten() for parameter in parameters]
        for part, measure in ((rows.held_out_ce, model.row_ce), (rows.held_out_kl, model.row_kl)):
            for first in range(0, part.num_rows, KL_ROWS):
                batch = part.select(range(first, min(first + KL_ROWS, part.num_rows)))
                found.append(measure(batch).sums)
        return torch.cat([values.float() for values in found])


def timed_sweep(
    shape: Shape, rows: Rows, device: torch.device, options: Callable[[int], dict[str, Any]]
) -> tuple[list[Seconds], list[Tensor]]:
    """Durations and results of all runs, one after the other.

    The durations include hashing the base model for the store, but not loading it.

    Args:
        shape: Shape of the model.
        rows: Rows of all runs.
        device: Device to run on.
        options: Function from the number of a run to its store and reference.
    """
    seconds, results = [], []
    for number, run in enumerate(Run(*pair) for pair in product(KL_WEIGHTS, SEEDS)):
        base = shape.base(device)
        gc.collect()
        start = Seconds(clock(device), wall_clock(device))
        model = AdaptedModel(base, make_adapter("vector", shape), run.seed, **options(number)).to(device)
        results.append(run(model, rows))
        seconds.append(Seconds(clock(device) - start.own, wall_clock(device) - start.wall))
    return seconds, results


def run(shape: Shape, arguments: argparse.Namespace, device: torch.device, console: Console) -> None:
    """Time one shape at one depth, check that sharing a store changes no result, and print the table."""
    rows = Rows.make(arguments.steps, shape.vocab_size, device)
    folder = Path(tempfile.mkdtemp(prefix="sweep-", dir=arguments.folder))

    def stored(name: str) -> dict[str, Any]:
        options = StoreOptions(str(folder / name), ram_gib=arguments.ram_gib)
        return {"store": ActivationStore(options), "reference": "cached"}

    try:
        seconds, results = {}, {}
        for name, options in {
            "no store": lambda _: {},
            OWN: lambda number: stored(f"own-{number}"),
            SHARED: lambda _: stored("shared"),
        }.items():
            seconds[name], results[name] = timed_sweep(shape, rows, device, options)
    finally:
        shutil.rmtree(folder)
    if not all(torch.equal(*pair) for pair in zip(results[OWN], results[SHARED], strict=True)):
        raise ValueError("the runs that shared a store found other numbers than those that did not.")
    place = f"adapter enters layer {shape.layer} of {shape.num_layers}"
    table = Table(
        title=f"{len(results[SHARED])} runs, {shape.name}, vector, {place}, one epoch of {arguments.steps} steps; "
        f"{describe(rows.ce, rows.kl)}; held out: {describe(rows.held_out_ce, rows.held_out_kl)}"
    )
    for column in (
        "states are kept in",
        "s, all runs",
        "of cold stores",
        "the same by the wall clock",
        "s, first run",
        "s, median of the others",
    ):
        table.add_column(column, justify="left" if column == "states are kept in" else "right")
    for name, found in seconds.items():
        values, walls = ([getattr(each, clock) for each in found] for clock in Seconds._fields)
        cold = Seconds(*(sum(getattr(each, clock) for each in seconds[OWN]) for clock in Seconds._fields))
        others = sorted(values[1:])
        table.add_row(
            name,
            f"{sum(values):.1f}",
            f"{sum(values) / cold.own:.2f}",
            f"{sum(walls) / cold.wall:.2f}",
            f"{values[0]:.2f}",
            f"{others[len(others) // 2]:.2f}",
        )
    console.print(table)


def main() -> None:
    """Run the command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    parser.add_argument("--shape", nargs="+", default=list(shapes)[:1], choices=list(SHAPES))
    parser.add_argument(
        "--depth", nargs="+", type=float, default=[1 / 2, 2 / 3], help="share of layers below"
    )
    parser.add_argument("--steps", type=int, default=16, help="of each run, 2 + 8 rows each")
    parser.add_argument("--ram_gib", type=float, default=4.0, help="of each run's store, beside the disk")
    parser.add_argument("--folder", help="where to put the stores; a temporary folder if not given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, depth in product(arguments.shape, arguments.depth):
        run(replace(SHAPES[name], depth=depth), arguments, device, Console(width=140))


if __name__ == "__main__":
    main()
