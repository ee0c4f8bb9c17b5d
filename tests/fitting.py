"""Run the real command on tiny inputs, in this process or in others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_em.__main__ import main
from lightning_em.records import read_metrics
from lightning_em.runs import RunFolder

SteppedMetrics = dict[int, dict[str, float]]

VECTOR = {"class_path": "lightning_em.adapters.SteeringVector", "init_args": {"layer": 0.5, "alpha": 4.0}}
LORA = {
    "class_path": "lightning_em.adapters.LoRA",
    "init_args": {"rank": 4, "alpha": 8.0, "layers": [1], "target_modules": ["down_proj"]},
}


def experiment(model: Path, narrow: Path, kl: Path | None = None, **groups: dict[str, Any]) -> dict[str, Any]:
    """A small experiment: 3 epochs of 5 optimiser steps on 36 rows, a checkpoint every second step."""
    config: dict[str, Any] = {
        "model": {
            "base": {"path": str(model)},
            "adapter": VECTOR,
            "objective": {"kl_weight": 1.0 if kl else 0.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05, "weight_decay": 0.0}},
        },
        "data": {"narrow": {"path": str(narrow)}, "batch_size": 8, "kl_batch_size": 8},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False},
        "checkpoint": {"every_n_steps": 2},
    }
    if kl is not None:
        config["data"]["kl"] = {"path": str(kl), "answer": "mixed"}
    for group, values in groups.items():
        config[group] = config.get(group, {}) | values
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a config as YAML; returns the path."""
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def fit(config: Path, name: str, *flags: str) -> RunFolder:
    """Fit in this process, into `name` beside the config; the command must succeed."""
    words = [
        "fit",
        "--config",
        str(config),
        "--run.root",
        str(config.parent),
        "--run.name",
        name,
        *flags,
        "--debug",
    ]
    assert main(words) == 0
    return RunFolder(config.parent / name)


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `lightning-em` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_em", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


def metrics_of(run: RunFolder) -> SteppedMetrics:
    """Metrics by step, without those of the machine."""
    machine = ("train/tokens_per_second", "train/memory_bytes")
    table = read_metrics(run.metrics_file)
    return {step: {k: v for k, v in row.items() if k not in machine} for step, row in table.items()}


def train_metrics(run: RunFolder) -> SteppedMetrics:
    """Training metrics by step, without those of the machine."""
    return {
        step: values
        for step, row in metrics_of(run).items()
        if (values := {name: value for name, value in row.items() if name.startswith("train/")})
    }


def final_adapter(run: RunFolder) -> bytes:
    """Bytes of the last checkpoint's adapter."""
    return (run.checkpoint(run.steps()[-1]) / "adapter_model.safetensors").read_bytes()


def cut_after(run: RunFolder, step: int, copy: Path) -> RunFolder:
    """A copy of `run` whose last checkpoint is that of `step`; its metrics run on, as after a kill."""
    shutil.copytree(run.path, copy)
    cut = RunFolder(copy)
    for later in (s for s in cut.steps() if s > step):
        shutil.rmtree(cut.checkpoint(later))
    cut.update_run(status="running")
    return cut
