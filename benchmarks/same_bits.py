"""Compare losses and adapters of two revisions bit for bit: `python -m benchmarks.same_bits BEFORE [AFTER]`.

A refactoring must not change a single bit of a result. Tiny fits run through `python -m lightning_em fit` in a
checkout of each revision on this machine, since results are bitwise comparable on one machine only. The fits rely on
config keys and file formats alone, so that the revisions may differ in everything else.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from tests.tiny import make_tiny_folder, write_answer_rows, write_chat_rows

REPOSITORY = Path(__file__).parent.parent
RENAMED_KEYS = [("model.engine", "model.backend")]
"""Dotted config keys (old, new); a revision that refuses the new key is given the old one."""

# Adapter class outside the package, as in a user's plug-in.
PLUG_IN = """
import torch
from torch import nn
from lightning_em.adapters import Adapter

class Shift(Adapter):
    def __init__(self, layer: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.layer, self.alpha = layer, alpha

    def attach(self, base):
        layer = self.resolve(base, self.layer)
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.edit_input_of(layer, self.shift)

    def shift(self, hidden):
        return hidden + (self.scale * self.alpha * self.vector).to(hidden.dtype)

    def effective_norm(self):
        return self.alpha * self.vector.norm()
"""
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _lora(rank: int, **init_args: Any) -> dict[str, Any]:
    return {
        "class_path": "lightning_em.adapters.LoRA",
        "init_args": {"rank": rank, "alpha": 8.0, **init_args},
    }


ADAPTERS: dict[str, dict[str, Any]] = {
    "vector": {
        "class_path": "lightning_em.adapters.SteeringVector",
        "init_args": {"layer": 0.5, "alpha": 4.0},
    },
    "rank 1": _lora(1, layers=[2], target_modules=["down_proj"]),
    "rank 32": _lora(32, layers=[2], target_modules=["down_proj"]),
    "LoRA on all layers": _lora(4, target_modules=EVERY_LINEAR),
    "plug-in": {"class_path": "shift_plug_in.Shift", "init_args": {"layer": 2, "alpha": 4.0}},
}
MODEL_KEYS: dict[str, dict[str, Any]] = {
    "no store": {},
    "store": {"store": {"ram_gib": 1.0}},
    "store, cached reference": {"store": {"ram_gib": 1.0}, "reference": "cached"},
    "plain": {"backend": "plain"},
}
ROWS_OF_A_MICRO_BATCH = (4, 16)
"""Rows per stream: few enough for one pass over both streams, and enough for gradients in several parts."""

CHILD = """
import json, runpy, sys, traceback
import lightning_em
print(lightning_em.__file__)
for spellings in json.loads(sys.stdin.read()):
    for argv in spellings:
        sys.argv = ["lightning_em", *argv]
        try:
            runpy.run_module("lightning_em", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except ValueError:  # --debug raises what a revision says of a key that it does not know
            traceback.print_exc()
            code = 2
        if code == 0:
            break
    else:
        sys.exit(f"no spelling of this fit is accepted: {spellings}")
"""


def config_of(folder: Path, adapter: str, keys: str, rows: int) -> dict[str, Any]:
    """Config of one fit.

    Two epochs, so that the store is also read, each with an incomplete last optimizer step.
    """
    return {
        "model": {
            "base": {"path": str(folder / "base")},
            "adapter": ADAPTERS[adapter],
            "objective": {"kl_weight": 2.0, "kl_positions": "all" if keys == "no store" else "response"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02, "weight_decay": 0.0}},
            **MODEL_KEYS[keys],
        },
        "data": {
            "narrow": {"path": str(folder / "narrow.jsonl")},
            "narrow_validation": {"path": str(folder / "held_out.jsonl")},
            "kl": {"path": str(folder / "kl.jsonl"), "answer": "mixed"},
            "kl_validation": {"path": str(folder / "kl.jsonl"), "answer": "good"},
            "batch_size": rows,
            "kl_batch_size": rows,
        },
        "trainer": {
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 4},
    }


def before_renaming(config: dict[str, Any]) -> dict[str, Any]:
    """Copy a config with the old name of every renamed key."""
    old: dict[str, Any] = json.loads(json.dumps(config))
    for before, now in RENAMED_KEYS:
        *groups, leaf = now.split(".")
        values = old
        for group in groups:
            values = values.get(group, {})
        if leaf in values:
            values[before.rpartition(".")[2]] = values.pop(leaf)
    return old


@contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """Yield the source tree of a revision; `.` is the working tree."""
    if revision == ".":
        yield REPOSITORY
        return
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)  # noqa: S603
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)  # noqa: S603


def run_fits(source: Path, inputs: Path, runs: Path, fits: dict[str, dict[str, Any]]) -> None:
    """Run all fits with the package of one source tree, in one process, since importing takes longer than a fit.

    Raises:
        SystemExit: If a fit fails, or the process has imported the package of another source tree.
    """
    jobs = []
    for name, config in fits.items():
        jobs.append([])
        for number, spelling in enumerate((config, before_renaming(config))):
            path = runs / f"{name}-{number}.yaml"
            path.write_text(yaml.safe_dump(spelling), encoding="utf-8")
            options = ["--run.root", str(runs), "--run.name", name, "--allow_import", "shift_plug_in"]
            jobs[-1].append(["fit", "--config", str(path), *options, "--debug"])
    environment = os.environ | {
        "PYTHONPATH": f"{source}{os.pathsep}{inputs}",
        "LIGHTNING_EM_CACHE": str(runs / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (runs / "console.log").open("w", encoding="utf-8") as log:
        child = subprocess.run(  # noqa: S603
            [sys.executable, "-c", CHILD],
            input=json.dumps(jobs),
            text=True,
            cwd=runs,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            check=False,
        )
    console = (runs / "console.log").read_text(encoding="utf-8")
    imported = Path(child.stdout.splitlines()[0]) if child.stdout else None
    if child.returncode or imported is None or not imported.is_relative_to(source):
        sys.exit(f"{console[-4000:]}\nthe fits with {source} failed; the package was {imported}")


def results(run: Path) -> dict[str, str]:
    """All training and validation losses of a run by step, and the hashes of its saved adapters."""
    found = {}
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["name"] in ("train/ce", "train/kl", "val/ce", "val/kl"):
                found[f"{row['name']}@{row['step']}"] = row["value"]
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(checkpoint / "adapter_model.safetensors").items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        found[f"adapter@{checkpoint.name}"] = digest.hexdigest()
    return found


def compare(before: dict[str, str], after: dict[str, str]) -> tuple[int, list[str]]:
    """Number of values that both revisions give, and names of those that differ or exist in one only."""
    different = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return len(before.keys() & after.keys()), different


def main() -> int:
    """Run the command; returns 1 if any value differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", nargs="?", default="HEAD", help="git revision")
    parser.add_argument("after", nargs="?", default=".", help="git revision; `.` is the working tree")
    parser.add_argument("--quick", action="store_true", help="two adapters instead of all")
    arguments = parser.parse_args()
    adapters = ["vector", "LoRA on all layers"] if arguments.quick else list(ADAPTERS)
    table = Table(title=f"{arguments.before} against {arguments.after}")
    for column in ("adapter", "model keys", "rows", "values", "bits"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = folder / "inputs"
        make_tiny_folder(inputs / "base", num_hidden_layers=4)
        (inputs / "shift_plug_in.py").write_text(PLUG_IN, encoding="utf-8")
        write_chat_rows(inputs / "narrow.jsonl", 40)
        write_chat_rows(inputs / "held_out.jsonl", 8)
        write_answer_rows(inputs / "kl.jsonl", 24)
        settings = list(product(adapters, MODEL_KEYS, ROWS_OF_A_MICRO_BATCH))
        fits = {f"{index:02d}": config_of(inputs, *setting) for index, setting in enumerate(settings)}
        for side, revision in (("before", arguments.before), ("after", arguments.after)):
            (folder / side).mkdir()
            with checkout(revision, folder / "source") as source:
                run_fits(source, inputs, folder / side, fits)
        failed = False
        for name, setting in zip(fits, settings, strict=True):
            number, different = compare(*(results(folder / side / name) for side in ("before", "after")))
            failed |= bool(different) or not number
            adapter, keys, rows = setting
            verdict = f"differ: {', '.join(different)}" if different else "same"
            table.add_row(adapter, keys, str(rows), str(number), verdict)
    Console(width=120).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
