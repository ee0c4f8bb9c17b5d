"""Peak memory of one training step, with each variant in its own process: `python -m benchmarks.memory --help`."""

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.peers import Peer
from benchmarks.shapes import ADAPTERS, SHAPES, describe, step_batches
from benchmarks.step import NAIVE, chosen, contestants

_MB = 1e6


def peak(
    make: Callable[[], Peer], arguments: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Peak memory of a step in MB: above the memory in use before it, and in total.

    The memory in use before holds the weights and what `prepare` keeps. A short warm-up step runs first, so that
    libraries and gradient buffers are already allocated.
    """
    ce, kl = (batch.to(device) for batch in step_batches(arguments.rows, SHAPES[arguments.shape]))
    warm_ce, warm_kl = (batch.to(device) for batch in step_batches(1, SHAPES[arguments.shape]))
    peer = make()
    peer.prepare(warm_ce, warm_kl)
    peer.step(warm_ce, warm_kl)
    peer.prepare(ce, kl)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer.step(ce, kl)
        return (torch.cuda.max_memory_allocated() - before) / _MB, torch.cuda.max_memory_allocated() / _MB
    before = _resident()
    _reset_peak()
    peer.step(ce, kl)
    top = _peak_resident()
    return (top - before) / _MB, top / _MB


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _resident() -> int:
    return _status("VmRSS") or _peak_resident()


def _peak_resident() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    """Reset the peak to the memory in use. Where that is not possible, the peak includes loading the model."""
    # Linux: writing 5 to clear_refs resets VmHWM, see proc(5).
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main() -> None:
    """Run the command: the child processes measure, the parent prints the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    default = "qwen2.5-7b" if device.type == "cuda" else "headheavy"
    parser.add_argument("--shape", default=default, choices=list(SHAPES))
    parser.add_argument("--adapter", default="vector", choices=ADAPTERS)
    parser.add_argument("--rows", type=int, default=8, help="rows of each stream")
    help_text = "parts of names of variants to run beside naive; all if not given"
    parser.add_argument("--variant", nargs="+", default=[""], help=help_text)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[arguments.shape]
    peers = contestants(shape, arguments.adapter, device)
    console = Console(width=140)
    if arguments.only:
        sys.stdout.write(json.dumps(peak(peers[arguments.only], arguments, device)) + "\n")
        return
    batches = step_batches(arguments.rows, shape)
    table = Table(title=f"{shape.name}, {arguments.adapter}: {describe(*batches)}; a process each")
    for column in ("variant", "peak of the step, MB", "of naive", "peak in all, MB"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    measured: dict[str, tuple[float, float]] = {}
    names = chosen(peers, arguments.variant, always=(NAIVE,))
    for name in track(names, "variants", console=Console(stderr=True), transient=True):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", *sys.argv[1:], "--only", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
        step, total = json.loads(output.splitlines()[-1])
        measured[name] = (step, total)
    for name, (step, total) in measured.items():
        table.add_row(name, f"{step:.0f}", f"{step / measured[NAIVE][0]:.2f}", f"{total:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
