"""Recorded runs with known numbers, written in milliseconds: what analysis, figures and notebooks read."""

from pathlib import Path

import yaml

from lightning_em.manifest import publish
from lightning_em.records import Point, ProbeResult, append_lines
from lightning_em.runs import RunFolder

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0)


def parabola(lowest_at: float, base: float = 2.0, lowest: float = 0.5) -> tuple[float, ...]:
    """Loss at each of `SCALES`: `base` at 0, `lowest` at one scale."""
    return tuple(lowest + (base - lowest) * (scale / lowest_at - 1) ** 2 for scale in SCALES)


def scale_curve(ce: tuple[float, ...], norm: float, step: int = 4) -> ProbeResult:
    """A record as the probe of that name writes it."""
    points = [
        Point("ce", value, "nats_per_token", {"scale": scale}, 0.01, 40)
        for scale, value in zip(SCALES, ce, strict=True)
    ]
    return ProbeResult("scale_curve", step, {}, (*points, Point("effective_norm", norm, "norm")))


def record_run(
    folder: Path, base: str, *curves: ProbeResult, status: str = "finished", ended: str = "2030-01-01"
) -> RunFolder:
    """A run folder with a config, a checkpoint that fails nothing but holds no adapter, and these records."""
    run = RunFolder(folder)
    run.update_run(status=status, ended=ended)
    run.config_file.write_text(yaml.safe_dump({"model": {"base": {"path": base}}}), encoding="utf-8")
    publish(run.checkpoint(4), lambda temporary: (temporary / "empty").touch())
    append_lines(run.probe_file("scale_curve"), *(curve.to_json() for curve in curves))
    return run
