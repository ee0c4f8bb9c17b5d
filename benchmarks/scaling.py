"""Speed of two processes against one: `python -m benchmarks.scaling --help`.

Both make the same optimizer steps on the same rows. Each of the two processes runs half of the micro-batches. Every
process has one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from lightning_em.records import read_metrics
from tests.tiny import make_tiny_folder, write_answer_rows, write_chat_rows

TRAINERS = Path(__file__).parent.parent / "configs" / "trainer"
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12, "head_dim": 64}
ACCUMULATE = 4
_WARM_UP_STEPS = 2


def experiment(folder: Path, num_rows: int) -> Path:
    """Write a model with a few million weights and its data; returns the config file."""
    make_tiny_folder(folder / "model", **SHAPE)
    config = {
        "model": {
            "base": {"path": str(folder / "model")},
            "adapter": {"class_path": "lightning_em.adapters.SteeringVector", "init_args": {"layer": 0.5}},
            "objective": {"kl_weight": 1.0},
        },
        "data": {
            "narrow": {"path": str(write_chat_rows(folder / "chat.jsonl", num_rows))},
            "kl": {"path": str(write_answer_rows(folder / "answers.jsonl", num_rows)), "answer": "mixed"},
            "batch_size": 4,
            "kl_batch_size": 8,
            "validation_fraction": 0,
        },
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
        "checkpoint": {"every_n_steps": 0},
        "run": {"root": str(folder)},
    }
    path = folder / "scaling.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def tokens_per_second(config: Path, trainer: str, num_processes: int, name: str) -> float:
    """Median tokens per second over the steps of one fit, without the first steps.

    Raises:
        subprocess.CalledProcessError: If the fit fails.
    """
    words = ["--config", str(config), "--trainer", str(TRAINERS / f"{trainer}.yaml"), "--run.name", name]
    words += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    words += [f"--trainer.accumulate_grad_batches={ACCUMULATE // num_processes}"]
    command = [sys.executable, "-m", "lightning_em", "fit", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603 (our own arguments)
    metrics = read_metrics(config.parent / name / "metrics.csv")
    paces = [row["train/tokens_per_second"] for _, row in sorted(metrics.items()) if "train/ce" in row]
    return statistics.median(paces[_WARM_UP_STEPS:])


def main() -> None:
    """Run the command: measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each, in turn")
    parser.add_argument("--rows", type=int, default=160, help="narrow rows; 16 are an optimiser step")
    options = parser.parse_args()
    contestants = {
        "one process": ("cpu", 1),
        "two, DDP": ("cpu_ddp2", 2),
        "two, base sharded": ("cpu_fsdp2", 2),
    }
    paces: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        config = experiment(Path(folder), options.rows)
        for repeat in range(options.repeats):
            for number, (name, (trainer, processes)) in enumerate(contestants.items()):
                paces[name].append(tokens_per_second(config, trainer, processes, f"{number}-{repeat}"))
    table = Table(
        "",
        "tokens a second",
        "ratio to one process",
        title=f"{options.repeats} repeats, medians, gloo on CPU",
    )
    one = statistics.median(paces["one process"])
    for name, values in paces.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle:,.0f}", f"{middle / one:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
