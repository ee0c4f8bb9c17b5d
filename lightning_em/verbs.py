"""The verbs beside LightningCLI's: probe, runs, miniature, data. Heavy imports are inside."""

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table

from lightning_em import lock
from lightning_em.runs import RunFolder, locate, step_of

AnswerKind = Literal["messages", "good", "bad", "mixed", "both"]
console = Console()


def probe_run(
    run: str,
    config: str | None = None,
    num_examples: int = 64,
    batch_size: int = 16,
    allow_zero_adapter: bool = False,
) -> None:
    """Measure what is not on record yet, at every checkpoint of a run, or at one.

    Args:
        run: `runs/x` for every checkpoint, `runs/x@step-40` for one.
        config: YAML with `probes:`, as under `probing` in an experiment; the run's own if not given.
        num_examples: Training rows of each stream to measure on, with `config`.
        batch_size: Rows in one forward pass, with `config`.
        allow_zero_adapter: Measure also an adapter that changes no logit.
    """
    from rich.progress import track

    from lightning_em.rebuild import load_probing, load_run

    loaded = load_run(run, allow_zero_adapter)
    probing = load_probing(loaded.folder, config, num_examples, batch_size)
    steps = [loaded.step] if "@" in run else loaded.folder.steps()
    measured = 0
    with lock.RunLock(loaded.folder.path, ["probe", run]):
        for step in track(steps, description=f"probing {loaded.folder.path.name}", console=console):
            loaded.module.model.adapter.load(locate(f"{loaded.folder.path}@step-{step}")[1])
            measured += probing.measure(loaded.folder, loaded.module.model, loaded.data, step)
    console.print(f"{measured} new records in {loaded.folder.path / 'probes'}; {len(steps)} checkpoints.")


def list_runs(root: str = "runs") -> None:
    """List the runs under a folder with their state.

    Args:
        root: Folder of the runs.
    """
    folders = [RunFolder(file.parent) for file in sorted(Path(root).glob("*/run.json"))]
    if not folders:
        raise ValueError(f"there is no run under {root!r}; fit one, or give another --root.")
    table = Table("run", "status", "last checkpoint", "attempts", title=f"runs in {root}")
    for folder in folders:
        record, steps = folder.read_run(), folder.steps()
        last = f"step {steps[-1]} of {record.get('max_steps')}" if steps else "none"
        table.add_row(folder.path.name, folder.status(), last, str(len(record.get("attempts", []))))
    console.print(table)


def show_run(run: str) -> None:
    """Show where a run stands: status, versions, last metrics and records.

    Args:
        run: The run's folder.
    """
    from lightning_em.callbacks.metrics import read_metrics

    folder, checkpoint = locate(run)
    record = folder.read_run()
    table = Table("what", "value", title=str(folder.path), show_header=False)
    for key in ("status", "exit_reason", "base", "identity", "last_step"):
        table.add_row(key, str(record.get(key)))
    table.add_row("newest valid checkpoint", f"step {step_of(checkpoint)}")
    metrics = read_metrics(folder.metrics_file)
    for name in sorted({name for values in metrics.values() for name in values}):
        step = max(step for step, values in metrics.items() if name in values)
        table.add_row(f"{name} at step {step}", f"{metrics[step][name]:.6g}")
    for result in folder.probe_results():
        table.add_row(f"probe {result.probe}", f"step {result.step}, {len(result.points)} points")
    console.print(table)


def build_world(
    seed: int = 0, control: bool = False, blind_spot_share: float | None = None, force: bool = False
) -> None:
    """Build a miniature world unless it is there already, and say where it is.

    Args:
        seed: Of words, documents and initial weights.
        control: The world in which narrow is the easy solution.
        blind_spot_share: Share of pre-training documents by an advisor who is bad in the narrow domain only.
        force: Build it again.
    """
    from lightning_em import miniature
    from lightning_em.cli import hush

    hush()
    recipe = miniature.Recipe.control() if control else miniature.Recipe.default()
    if blind_spot_share is not None:
        recipe = recipe.with_blind_spot_share(blind_spot_share)
    folder = miniature.build(recipe, seed, force=force)
    console.print((folder / "world.json").read_text(encoding="utf-8"))
    console.print(str(folder))


def check_data(
    files: list[str] | None = None,
    config: str | None = None,
    kl: list[str] | None = None,
    evaluation: list[str] | None = None,
    base: str | None = None,
    allow_overlap: bool = False,
) -> int:
    """Check data files: bad and duplicate rows, lengths, topics, overlap of training and evaluation questions.

    Args:
        files: JSONL files with narrow rows.
        config: An experiment, whose files and tokenizer are taken.
        kl: JSONL files with parallel rows.
        evaluation: JSONL or YAML files with evaluation questions.
        base: Model whose tokenizer and chat template to check with (hub id or folder).
        allow_overlap: Evaluation questions that are also trained on are no fault.

    Returns:
        0, or 1 if there is a hard fault.
    """
    from lightning_em.data import ChatEncoder, check_files, report_tables
    from lightning_em.models import BaseModel

    files, kl, evaluation = list(files or ()), list(kl or ()), list(evaluation or ())
    tokenizer_source = BaseModel(base) if base else None
    if config is not None:
        from lightning_em.rebuild import experiment_parts

        parts = experiment_parts(config)
        tokenizer_source = tokenizer_source or parts.base
        files += [source.path for source in parts.data.sources["narrow"] if source]
        kl += [source.path for source in parts.data.sources.get("kl", ()) if source]
    if not files:
        raise ValueError("name JSONL files, or an experiment with --config.")
    encoder = ChatEncoder(tokenizer_source.load_tokenizer()) if tokenizer_source else None
    report = check_files(files, kl, evaluation, encoder, allow_overlap=allow_overlap)
    console.print(report_tables(report))
    return report.exit_code


def show_data(file: str, base: str, answer: AnswerKind = "messages", n: int = 3) -> None:
    """Show rows as the model reads them, the trained tokens in colour.

    Args:
        file: JSONL file.
        base: Model whose tokenizer and chat template to use (hub id or folder).
        answer: Which answer to take from question/good/bad rows.
        n: How many rows.
    """
    from lightning_em.data import ChatEncoder, ChatSource, as_chats, read_rows, select_rows, show_chats
    from lightning_em.models import BaseModel

    source = ChatSource(file, answer, limit=n)
    chats = as_chats(select_rows(read_rows(file), source), answer)
    console.print(show_chats(chats[:n], ChatEncoder(BaseModel(base).load_tokenizer())))


def _demo(root: str, seed: int) -> None:
    from lightning_em.demo import demo

    demo(root, seed)


def _table(**options: Any) -> None:
    from lightning_em.demo import table

    table(**options)


def _show(**options: Any) -> None:
    from lightning_em.demo import show

    show(**options)


def _dial(**options: Any) -> None:
    from lightning_em.demo import dial

    dial(**options)


def _parser() -> ArgumentParser:
    """One parser for all verbs here; every option has the name of the function's parameter."""
    top = ArgumentParser(prog="lightning-em", allow_abbrev=False)
    verbs = top.add_subparsers(required=True)

    probing = _verb(
        verbs, "probe", probe_run, "measure what is not on record yet, at every checkpoint of a run"
    )
    probing.add_argument("run", help="runs/x for every checkpoint, runs/x@step-40 for one")
    probing.add_argument(
        "--config", help="YAML with `probes:`, e.g. configs/probing/curves.yaml; default: the run's"
    )
    probing.add_argument(
        "--num_examples", type=int, default=64, help="training rows of each stream, with --config"
    )
    probing.add_argument("--batch_size", type=int, default=16, help="rows in one forward pass, with --config")
    probing.add_argument("--allow_zero_adapter", action="store_true", help="also one that changes no logit")

    runs = verbs.add_parser("runs", help="list runs, or show one").add_subparsers(required=True)
    _verb(runs, "ls", list_runs, "list runs with their state").add_argument("--root", default="runs")
    _verb(runs, "show", show_run, "show where a run stands").add_argument("run", help="runs/x")

    data = verbs.add_parser("data", help="look at data before training on it").add_subparsers(required=True)
    check = _verb(
        data, "check", check_data, "bad and duplicate rows, lengths, topics, overlaps; exit code 1 on faults"
    )
    check.add_argument("files", nargs="*", help="JSONL files with narrow rows")
    check.add_argument("--config", help="an experiment, whose files and tokenizer are taken")
    check.add_argument("--kl", nargs="*", help="JSONL files with parallel rows")
    check.add_argument("--evaluation", nargs="*", help="JSONL or YAML files with evaluation questions")
    check.add_argument("--base", help="model whose tokenizer and chat template to check with")
    check.add_argument(
        "--allow_overlap", action="store_true", help="evaluation questions in training are no fault"
    )
    show = _verb(data, "show", show_data, "rows as the model reads them, the trained tokens in colour")
    show.add_argument("file", help="JSONL file")
    show.add_argument("--base", required=True, help="model whose tokenizer and chat template to use")
    show.add_argument("--answer", choices=get_args(AnswerKind), default="messages")
    show.add_argument("--n", type=int, default=3, help="how many rows")

    worlds = verbs.add_parser("miniature", help="the embedded miniature world").add_subparsers(required=True)
    build = _verb(worlds, "build", build_world, "build a world unless it is there, and say where it is")
    build.add_argument("--seed", type=int, default=0, help="of words, documents and initial weights")
    build.add_argument(
        "--control", action="store_true", help="the world in which narrow is the easy solution"
    )
    build.add_argument(
        "--blind_spot_share", type=float, help="share of documents by an advisor bad in one domain"
    )
    build.add_argument("--force", action="store_true", help="build it again")
    table = _verb(
        worlds, "table", _table, "fit general and narrow adapters in several worlds, print bad-answer rates"
    )
    table.add_argument("--seeds", type=int, nargs="*", help="worlds; default 0 1 2 3 4")
    table.add_argument("--adapters", nargs="*", help="of rank32, rank1, vector; default all")
    table.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    table.add_argument("--control", action="store_true", help="in the control world")
    table.add_argument("--markdown", help="also write the table to this file")

    shown = _verb(worlds, "show", _show, "what runs in a miniature world do, side by side, also scaled up")
    shown.add_argument("runs", nargs="+", help="runs/x; the hash at the end may be left out")
    shown.add_argument("--scales", type=float, nargs="*", help="recorded scales; default 1")
    dial = _verb(
        worlds, "dial", _dial, "general and narrow rates against the share of one-domain bad advisors"
    )
    dial.add_argument(
        "--shares", type=float, nargs="*", help="of documents; default 0.005 0.015 0.03 0.06 0.12"
    )
    dial.add_argument("--seeds", type=int, nargs="*", help="worlds at each share; default 0")
    dial.add_argument("--adapter", default="rank32", choices=["rank32", "rank1", "vector"])
    dial.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    dial.add_argument("--output", default="runs/dial.png", help="PNG to write")

    demo = _verb(verbs, "demo", _demo, "the miniature study in one command")
    demo.add_argument("--root", default="runs", help="folder of the runs")
    demo.add_argument("--seed", type=int, default=0, help="world to use")
    return top


def _verb(verbs: Any, name: str, call: Callable[..., int | None], text: str) -> ArgumentParser:
    parser: ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(call=call)
    return parser


def main(words: list[str]) -> int:
    """Run one of the verbs with these words of the command line; returns the exit code."""
    options = vars(_parser().parse_args(words))
    return options.pop("call")(**options) or 0
