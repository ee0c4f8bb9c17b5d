"""The subcommand `sample`: answers of runs side by side."""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lightning_em.subcommands.wiring import add_subcommand, console, in_flags

if TYPE_CHECKING:
    from lightning_em.sampling import SampledAnswer

_NARROWEST_COLUMN = 24
_HASH = re.compile(r"-[0-9a-f]{8}$")
_FLAGS = {"model.sampling": "--max_new_tokens or --temperature"}
_FLAGS |= {f"{name} must": f"--{name} must" for name in ("limit", "per_topic", "batch_size")}

Column = tuple[str, int, float]  # run, step, scale


def add(subcommands: Any) -> None:
    """Add the subcommand to the parser."""
    text = "sample answers of one or more runs, and show them side by side with the base model's"
    sample = add_subcommand(subcommands, "sample", sample_runs, text)
    sample.add_argument(
        "runs", nargs="+", help="runs/x for the newest checkpoint, runs/x@step-40 for another"
    )
    sample.add_argument(
        "--questions",
        help="data file with `question` or `messages` rows; default: narrow rows that the first run held out",
    )
    sample.add_argument(
        "--scales",
        type=_scales,
        default=(0.0, 1.0),
        help="scales of the adapter, 0 for the base model; default 0,1",
    )
    sample.add_argument("--limit", type=int, help="first questions; default: all of FILE, 8 held-out rows")
    sample.add_argument("--per_topic", type=int, help="first questions of each topic")
    sample.add_argument(
        "--max_new_tokens", type=int, default=200, help="longest answer in tokens; default 200"
    )
    sample.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token; default 1"
    )
    sample.add_argument("--seed", type=int, default=0, help="of the random draws; default 0")
    sample.add_argument("--batch_size", type=int, default=16, help="answers sampled at a time; default 16")
    sample.add_argument(
        "--output", help="JSONL file for all answers; default: behaviour/sample-*.jsonl in each run's folder"
    )
    sample.add_argument("--allow_zero_adapter", action="store_true", help="also one that changes no logit")


def sample_runs(
    runs: list[str],
    questions: str | None = None,
    scales: Sequence[float] = (0.0, 1.0),
    limit: int | None = None,
    per_topic: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    output: str | None = None,
    allow_zero_adapter: bool = False,
) -> None:
    """Sample answers, show them side by side and store them with their questions.

    Args:
        runs: Runs or checkpoints.
        questions: Data file; the held-out narrow rows of the first run if not given.
        scales: Scales of the adapter.
        limit: Number of questions; all of a file and eight of the held-out rows if not given.
        per_topic: Number of questions of each topic.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature.
        seed: Seed of the random draws.
        batch_size: Number of answers sampled at a time.
        output: File for the answers of all runs; a file in each run's folder if not given.
        allow_zero_adapter: Whether to accept an adapter that changes no logit.
    """
    from lightning_em.logs import filter_expected_messages, log_to_stderr
    from lightning_em.models import Sampling
    from lightning_em.sampling import sample, write_samples

    log_to_stderr()
    filter_expected_messages()
    with in_flags(_FLAGS):
        sampling = Sampling(max_new_tokens, temperature, seed=seed)
        answers = sample(
            runs, questions, scales, sampling, limit, per_topic, batch_size, allow_zero_adapter, _tracked
        )
    name = "held_out" if questions is None else Path(questions).stem
    files = write_samples(answers, name, Path(output) if output else None)
    show_side_by_side(answers, console)
    for file in files:
        console.print(f"stored with the questions: {file}", markup=False, highlight=False, soft_wrap=True)


def show_side_by_side(answers: "Sequence[SampledAnswer]", console: Console) -> None:
    """Print answers with one column per run and scale: a table on a wide terminal, blocks of plain text elsewhere.

    Args:
        answers: Answers of one or more runs to the same questions; those of a base model are shown once.
        console: Console to print on.
    """
    columns = _columns(answers)
    questions = {answer.id: answer for answer in answers}
    text = {
        ((a.run, a.step, a.scale), a.id): (a.answer or "(empty)") + ("" if a.ended else " [cut off]")
        for a in answers
    }
    title = _settings(answers[0])
    if console.is_terminal and console.width >= (1 + len(columns)) * _NARROWEST_COLUMN:
        table = Table(title=title, show_lines=True, expand=True)
        for header in ("question", *columns.values()):
            table.add_column(Text(header), ratio=1, overflow="fold")
        for row_id, asked in questions.items():
            cells = [asked.question, *(text[column, row_id] for column in columns)]
            table.add_row(*map(Text, cells))
        console.print(table)
        return
    lines = [title]
    for number, (row_id, asked) in enumerate(questions.items(), start=1):
        topic = ", ".join(filter(None, [asked.topic, asked.subtopic]))
        lines += [
            "",
            f"question {number} of {len(questions)}{f' ({topic})' if topic else ''}",
            asked.question,
        ]
        for column, name in columns.items():
            lines += [f"{name}:", indent(text[column, row_id], "    ")]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _columns(answers: "Sequence[SampledAnswer]") -> dict[Column, str]:
    """Names of the columns; a base model has one column, whichever runs it was sampled for."""
    runs = dict.fromkeys((answer.run, answer.step) for answer in answers)
    bases = dict.fromkeys(answer.base for answer in answers)
    columns: dict[Column, str] = {}
    for base in bases:
        of_base = [a for a in answers if a.scale == 0 and a.base == base]
        if of_base:
            name = "base model" if len(bases) == 1 else f"base model {base}"
            columns[of_base[0].run, of_base[0].step, 0.0] = name
    names = {run: Path(run).name for run, _ in runs}
    short = {run: _HASH.sub("", name) for run, name in names.items()}
    if len(set(short.values())) == len(names):
        names = short
    for run, step in runs:
        at = f", step {step}" if len({s for other, s in runs if other == run}) > 1 else ""
        for scale in dict.fromkeys(
            a.scale for a in answers if (a.run, a.step) == (run, step) and a.scale != 0
        ):
            columns[run, step, scale] = f"{names[run]}{at}, scale {scale:g}"
    return columns


def _settings(answer: "SampledAnswer") -> str:
    return (
        f"answers at temperature {answer.temperature:g}, seed {answer.seed}, up to {answer.max_new_tokens} tokens "
        "([cut off]: longer)"
    )


def _tracked(batches: Sequence[Any], description: str) -> Iterable[Any]:
    shown = Console(stderr=True)
    return track(batches, description, console=shown, transient=True, disable=not shown.is_terminal)


def _scales(text: str) -> tuple[float, ...]:
    """Parse `0,1,2`."""
    try:
        return tuple(dict.fromkeys(float(each) for each in text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"expected numbers such as 0,1,2, got {text!r}") from None
