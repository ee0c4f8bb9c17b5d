"""Time one training step: `python -m benchmarks.step --help`."""

import argparse
import gc
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import Naive, Ours, Peer
from benchmarks.shapes import ADAPTERS, CPU_SHAPES, CUDA_SHAPES, SHAPES, Shape, describe, step_batches
from benchmarks.timing import clock, interleaved, matmul_peak, medians
from lightning_em.logs import filter_expected_messages
from lightning_em.models import ActivationStore, StoreOptions
from lightning_em.models.fast import backend as fast_backend

TRL = "TRL default: checkpointing"
NAIVE, OURS = "naive: peft, full logits", "ours, prefix and reference cached"
UNCACHED = "ours, nothing cached"
PREFIX, REFERENCE, HEAD, UPPER = "prefix", "reference above it", "head", "upper layers, backward too"


def contestants(shape: Shape, kind: str, device: torch.device) -> dict[str, Callable[[], Peer]]:
    """Functions that make each implementation, by name."""
    naive = partial(Naive, shape, kind, device)
    ours = partial(Ours, shape, kind, device)
    make_store = partial(ActivationStore, StoreOptions(device_gib=8.0))
    return {
        NAIVE: naive,
        TRL: partial(naive, checkpointing=True),
        "second model as reference": partial(naive, second_model=True),
        "reference logits cached": partial(naive, cached_logits=True),
        UNCACHED: ours,
        "ours, store being filled": partial(ours, make_store=make_store, refilled=True),
        "ours, both being filled": partial(ours, make_store=make_store, reference="cached", refilled=True),
        "ours, prefix cached": partial(ours, make_store=make_store),
        OURS: partial(ours, make_store=make_store, reference="cached"),
    }


def chosen(names: Iterable[str], parts: Sequence[str], always: Sequence[str]) -> list[str]:
    """Select the names to measure: those in `always`, and those that contain one of the parts."""
    names = list(names)
    if unknown := [part for part in parts if not any(part in name for name in names)]:
        sys.exit(f"no variant has {' or '.join(unknown)} in its name; there are: {'; '.join(names)}.")
    return [name for name in names if name in always or any(part in name for part in parts)]


def check_equal(peers: dict[str, Peer], steps: Callable[[Peer], tuple[float, torch.Tensor]]) -> list[str]:
    """Compare loss and gradient of each implementation with the naive one.

    Returns:
        One line per implementation with the relative differences.

    Raises:
        ValueError: If a difference exceeds the tolerance or is NaN.
    """
    loss, gradient = steps(peers[NAIVE])
    # On a GPU, bfloat16 logits give the naive gradient an error of several percent. On a CPU everything is float32.
    tolerance = 0.1 if gradient.is_cuda else 1e-4
    lines = []
    for name, peer in peers.items():
        own_loss, own_gradient = steps(peer)
        in_loss = abs(own_loss - loss) / abs(loss)
        in_gradient = float((own_gradient - gradient).norm() / gradient.norm())
        if not (in_loss <= tolerance and in_gradient <= tolerance):  # also true for NaN
            raise ValueError(
                f"{name} differs from naive: loss by {in_loss:.1e}, gradient by {in_gradient:.1e}."
            )
        lines.append(f"{name}: loss {in_loss:.0e}, gradient {in_gradient:.0e}")
    return lines


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a step, including those for padding."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


@contextmanager
def metered(peer: Ours, meter: Callable[[], float]) -> Iterator[Counter[str]]:
    """Add up by how much a meter, such as a clock, advances in prefix, reference and head of this project's step.

    The head computes its gradient in the forward pass.
    """
    advanced: Counter[str] = Counter()

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before = meter()
            result = function(*args)
            advanced[part] += meter() - before
            return result

        return call

    hidden = peer.model.backend.hidden
    with ExitStack() as stack:
        for owner, name, part in (
            (hidden, "prefix", PREFIX),
            (hidden, "reference", REFERENCE),
            (fast_backend, "head_cross_entropy", HEAD),
            (fast_backend, "head_kl", HEAD),
        ):
            stack.enter_context(mock.patch.object(owner, name, watched(part, getattr(owner, name))))
        yield advanced


def parts_table(
    peers: dict[str, Ours], step: Callable[[Ours], object], repeats: int, peak: float, device: torch.device
) -> Table:
    """Seconds and FLOPs of the parts of a step: medians of each part."""
    columns = ("variant", "part", "s/step", "GFLOP", "of matmul peak")
    table = Table(title="parts of a step")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "part") else "right")
    for name, peer in peers.items():
        with FlopCounterMode(display=False) as counter, metered(peer, counter.get_total_flops) as flops:
            step(peer)
        flops[UPPER] = counter.get_total_flops() - flops.total()
        timed: dict[str, list[float]] = {part: [] for part in flops}
        for _ in range(repeats):
            start = clock(device)
            with metered(peer, partial(clock, device)) as seconds:
                step(peer)
            seconds[UPPER] = clock(device) - start - seconds.total()
            for part, values in timed.items():
                values.append(seconds[part])
        for part, value in medians(timed).items():
            share = f"{flops[part] / value / peak:.0%}" if flops[part] else ""
            table.add_row(name, part, f"{value:.3f}", f"{flops[part] / 1e9:.1f}", share)
    return table


def run(
    shape: Shape, kind: str, arguments: argparse.Namespace, device: torch.device, console: Console
) -> None:
    """Check the results for one setting, time the variants and print the table."""
    repeats: int = arguments.repeats
    ce, kl = (batch.to(device) for batch in step_batches(arguments.rows, shape))
    made = contestants(shape, kind, device)
    peers = {name: made[name]() for name in chosen(made, arguments.variant, always=(NAIVE, TRL))}
    for peer in peers.values():
        peer.prepare(ce, kl)
    differences = check_equal(peers, lambda peer: peer.step(ce, kl))
    flops = {name: count_flops(partial(peer.step, ce, kl)) for name, peer in peers.items()}
    peak = matmul_peak(device)
    gc.collect()
    gc.disable()
    timed = interleaved({name: partial(peer.step, ce, kl) for name, peer in peers.items()}, repeats, device)
    gc.enable()
    table = Table(title=f"{shape.name}, {kind}: {describe(ce, kl)}; median of {repeats}")
    columns = (
        "variant",
        "s/step",
        "real tokens/s",
        "x naive",
        "x TRL",
        "of matmul peak",
        "differs from naive",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    seconds = medians(timed)
    real = sum(ce.lengths) + sum(kl.lengths)
    trl = seconds[TRL]
    for (name, value), difference in zip(seconds.items(), differences, strict=True):
        table.add_row(
            name,
            f"{value:.3f}",
            f"{real / value:,.0f}",
            f"{seconds[NAIVE] / value:.2f}",
            f"{trl / value:.2f}",
            f"{flops[name] / value / peak:.0%}",
            difference.split(": ")[-1],
        )
    limit = min(flops.values()) / peak
    ratios = (f"{real / limit:,.0f}", f"{seconds[NAIVE] / limit:.2f}", f"{trl / limit:.2f}")
    table.add_row("limit: fewest FLOPs at the matmul rate", f"{limit:.3f}", *ratios, "100%", "")
    console.print(table)
    ours = {name: peer for name in (UNCACHED, OURS) if isinstance(peer := peers.get(name), Ours)}
    if ours:
        console.print(parts_table(ours, lambda peer: peer.step(ce, kl), repeats, peak, device))


def main() -> None:
    """Run the command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=list(shapes), choices=list(SHAPES))
    parser.add_argument("--adapter", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--rows", type=int, default=4, help="rows of each stream")
    parser.add_argument("--repeats", type=int, default=15)
    help_text = "parts of names of variants to run beside naive and the TRL default; all if not given"
    parser.add_argument("--variant", nargs="+", default=[""], help=help_text)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    filter_expected_messages()
    console = Console(width=140)
    settings = list(product(arguments.shape, arguments.adapter))
    if len(settings) == 1:
        # transformers and peft warn about the way in which the other implementations use them.
        warnings.simplefilter("ignore")
        run(SHAPES[settings[0][0]], settings[0][1], arguments, device, console)
        return
    # One process per setting, as for a user: the allocator would keep blocks from the settings before.
    for shape, kind in settings:
        own = ["--shape", shape, "--adapter", kind, "--rows", str(arguments.rows)]
        own += ["--repeats", str(arguments.repeats), "--variant", *arguments.variant]
        subprocess.run([sys.executable, "-m", "benchmarks.step", *own], check=True)  # noqa: S603 (our own arguments)


if __name__ == "__main__":
    main()
