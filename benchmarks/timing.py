"""Interleaved timing: all contestants see the same weather."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU on a CPU (a busy machine does not count), of the wall on a GPU."""
    return wall_clock(device) if device.type == "cuda" else time.process_time()


def wall_clock(device: torch.device) -> float:
    """Seconds of the wall, which also sees what waits for a disk."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = clock(device)
            run()
            elapsed = clock(device) - start
            if repeat:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(device: torch.device) -> float:
    """Floating-point operations a second of a large square product, as measured here."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timed = interleaved({"mm": lambda: left @ right}, 10, device)
    return 2 * size**3 / medians(timed)["mm"]
