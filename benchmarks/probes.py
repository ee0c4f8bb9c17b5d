"""Time a probe sweep over scales: `python -m benchmarks.probes --help`."""

import argparse
import gc
import math
from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.beft.layer import BeftLayer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Naive, Ours
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, Shape, describe, step_batches
from benchmarks.timing import interleaved, medians
from lightning_em.batch import PackedBatch
from lightning_em.models import ActivationStore, StoreOptions

NAIVE = "naive loop: points outer, full logits"


class NaiveSweep:
    """The plain implementation: for each scale and each padded batch, a full forward pass with all logits."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.peer = Naive(shape, "vector", device)
        self.full = [parameter.detach().clone() for parameter in self.peer.parameters]
        assert any(isinstance(module, BeftLayer) for module in self.peer.model.modules())

    @torch.no_grad()
    def __call__(self, batches: list[PackedBatch], scales: list[float]) -> Tensor:
        """Loss of each row, `[scales rows]`, in nats per token."""
        results = []
        for scale in scales:
            for parameter, full in zip(self.peer.parameters, self.full, strict=True):
                parameter.copy_(scale * full)
            results.append(torch.cat([self._rows(batch) for batch in batches]))
        return torch.stack(results)

    def _rows(self, batch: PackedBatch) -> Tensor:
        logits = self.peer._forward(batch)[:, :-1].float()
        labels = torch.where(batch.response_mask, batch.input_ids, -100)
        rows = list(torch.split(labels, list(batch.lengths)))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)[:, 1:]
        losses = functional.cross_entropy(logits.flatten(0, 1), padded.flatten(), reduction="none").view_as(
            padded
        )
        return (losses.sum(1) / (padded != -100).sum(1)).double()


class OurSweep:
    """This project's `sweep_row_ce`."""

    def __init__(self, shape: Shape, device: torch.device, store: ActivationStore | None = None) -> None:
        self.model = Ours(shape, "vector", device, make_store=(lambda: store) if store else None).model

    def __call__(self, batches: list[PackedBatch], scales: list[float]) -> Tensor:
        """Loss of each row, `[scales rows]`, in nats per token."""
        states = [partial(self.model.adapter.at_scale, scale) for scale in scales]
        return torch.stack([rows.sums / rows.counts for rows in self.model.sweep_row_ce(batches, states)])


def run(shape: Shape, arguments: argparse.Namespace, device: torch.device, console: Console) -> None:
    """Check the results for one shape, time the sweeps and print the table."""
    batches = [batch.to(device) for batch in step_batches(arguments.rows, shape)]
    scales = [2 * index / (arguments.points - 1) for index in range(arguments.points)]
    sweeps: dict[str, Callable[[list[PackedBatch], list[float]], Tensor]] = {
        NAIVE: NaiveSweep(shape, device),
        "ours, nothing cached": OurSweep(shape, device),
        "ours, prefix cached": OurSweep(shape, device, ActivationStore(StoreOptions(device_gib=8.0))),
    }
    expected = sweeps[NAIVE](batches, scales)
    differences = {}
    for name, sweep in sweeps.items():
        differences[name] = float(((sweep(batches, scales) - expected) / expected).abs().max())
        if differences[name] > (1e-2 if device.type == "cuda" else 1e-6) or math.isnan(differences[name]):
            raise ValueError(f"{name} differs from the naive loop by {differences[name]:.1e}, relative.")
    gc.collect()
    runs = {name: partial(sweep, batches, scales) for name, sweep in sweeps.items()}
    seconds = medians(interleaved(runs, arguments.repeats, device))
    title = f"{shape.name}, vector, {arguments.points} scales: {describe(*batches)}; median of {arguments.repeats}"
    table = Table(title=title)
    for column in ("variant", "s/sweep", "x naive", "largest relative difference of a row's loss"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{seconds[NAIVE] / value:.2f}", f"{differences[name]:.0e}")
    console.print(table)


def main() -> None:
    """Run the command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    parser.add_argument("--shape", nargs="+", default=list(shapes), choices=list(SHAPES))
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows of each of the two batches")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.points < 2:
        parser.error("--points must be at least 2")
    torch.set_num_threads(1)
    for name in arguments.shape:
        run(SHAPES[name], arguments, device, Console(width=140))


if __name__ == "__main__":
    main()
