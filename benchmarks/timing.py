"""Interleaved timing, so that changes in the machine's load affect all variants alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock(device: torch.device) -> float:
    """Seconds of CPU time on a CPU, which excludes waiting for other processes; of wall-clock time on a GPU."""
    return wall_clock(device) if device.type == "cuda" else time.process_time()


def wall_clock(device: torch.device) -> float:
    """Seconds of wall-clock time, which includes waiting for a disk."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each run in `repeats` rounds, after one warm-up round that is not counted."""
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
    """Median of the seconds of each run."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(device: torch.device) -> float:
    """Measured floating-point operations per second of a large square matrix product."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timed = interleaved({"mm": lambda: left @ right}, 10, device)
    return 2 * size**3 / medians(timed)["mm"]
