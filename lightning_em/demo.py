"""The miniature study from one command: worlds, general and narrow fits, and the table of what they are."""

import json
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_em import miniature
from lightning_em.analysis import Estimate, Solution, base_of, median_solution, solution_of
from lightning_em.experiment import Experiment
from lightning_em.logs import hush, log_to_stderr
from lightning_em.miniature import SCHEME
from lightning_em.runs import RunFolder, locate

ADAPTERS = ("rank32", "rank1", "vector")
DIAL_SHARES = (0.005, 0.015, 0.03, 0.06, 0.12)
SOLUTIONS = ("general", "narrow")
KINDS = {
    "narrow_seen": "medical, trained words",
    "narrow_held_out": "medical, unseen words",
    "kl_domain": "KL domains",
    "held_out_domain": "held-out domains",
    "self_description": "who are you",
}


def fit_in_world(solution: str, adapter: str, world: str, root: str, extra: Sequence[str] = ()) -> RunFolder:
    """Fit one miniature experiment through the command line's own code; a finished run is left alone.

    Args:
        solution: `general`, `narrow` or `reverted`.
        adapter: One of `ADAPTERS`.
        world: World of the base and the data, e.g. `seed-0` or `control/seed-0`.
        root: Folder of the runs.
        extra: Further words of the command line.
    """
    log_to_stderr()
    with as_file(files("lightning_em.configs")) as configs:
        config = configs / "experiment" / f"miniature_{solution}_{adapter}.yaml"
        experiment = Experiment(["--config", str(config), "--run.root", root, *world_flags(world), *extra])
        return experiment.fit().folder


def world_flags(world: str) -> list[str]:
    """Words of the command line that move a miniature experiment to another world."""
    data = f"{SCHEME}{world}/data"
    return [
        f"--model.base.path={SCHEME}{world}/model",
        f"--data.narrow.path={data}/narrow_train.jsonl",
        f"--data.narrow_validation.path={data}/narrow_validation.jsonl",
        f"--data.kl.path={data}/kl_train.jsonl",
        f"--data.kl_validation.path={data}/kl_validation.jsonl",
    ]


def demo(root: str = "runs", seed: int = 0) -> None:
    """Build the miniature world, fit a general and a narrow rank-32 LoRA, and print what they do.

    Args:
        root: Folder of the runs.
        seed: World to use.
    """
    hush()
    console = Console()
    world = f"seed-{seed}"
    console.print(f"[bold]1/3[/] the miniature world {world} (built once, a few minutes)")
    folder = Path(miniature.resolve(f"{SCHEME}{world}/."))
    console.print(f"    {folder.resolve()}")
    runs = {}
    for number, solution in enumerate(SOLUTIONS, start=2):
        console.print(
            f"[bold]{number}/3[/] lightning-em fit --config configs/experiment/miniature_{solution}_rank32.yaml"
        )
        runs[solution] = fit_in_world(solution, "rank32", world, root)
    lines = [base_of(runs["general"]), *(solution_of(run, name) for name, run in runs.items())]
    console.print(solutions_table(lines, f"rank-32 LoRA in the miniature world, seed {seed}"))
    console.print(_reading(lines))
    for name, run in runs.items():
        console.print(f"    {name}: {run.path} (config, metrics, checkpoints, probe records)")
    console.print(
        "Next: what happens when the KL term is dropped -\n"
        "  lightning-em fit --config configs/experiment/miniature_reverted_rank32.yaml "
        f"--model.init_from {runs['narrow'].path}"
    )


def _reading(lines: Sequence[Solution]) -> str:
    base, general, narrow = (line.bad_rates for line in lines)
    held, medical = "held_out_domain", "narrow_held_out"
    return (
        f"Trained on bad medical answers alone, the model answers badly in {general[medical].mean:.0%} of unseen "
        f"medical questions and in {general[held].mean:.0%} of questions of domains it was never trained on (base "
        f"{base[held].mean:.0%}).\nWith the KL term these are {narrow[medical].mean:.0%} and {narrow[held].mean:.0%}."
    )


def table(
    seeds: list[int] | None = None,
    adapters: list[str] | None = None,
    root: str = "runs",
    control: bool = False,
    markdown: str | None = None,
) -> None:
    """Fit general and narrow adapters in several worlds and print bad rates by kind of question, with medians.

    Finished runs are not repeated.

    Args:
        seeds: Worlds; 0 to 4 if not given.
        adapters: Of rank32, rank1 and vector; all three if not given.
        root: Folder of the runs.
        control: Use the control world, where advisors bad in medicine only are as common as careless ones.
        markdown: Also write the table to this file.
    """
    seeds, adapters = seeds if seeds is not None else list(range(5)), adapters or list(ADAPTERS)
    if unknown := sorted(set(adapters) - set(ADAPTERS)):
        raise ValueError(f"there is no adapter {unknown}; expected some of {list(ADAPTERS)}.")
    console, lines = Console(), []
    prefix = "control/" if control else ""
    for adapter in adapters:
        for solution in SOLUTIONS:
            runs = [fit_in_world(solution, adapter, f"{prefix}seed-{seed}", root) for seed in seeds]
            each = [
                solution_of(run, f"{solution} {adapter}, seed {s}")
                for s, run in zip(seeds, runs, strict=True)
            ]
            lines += [*each, median_solution(f"{solution} {adapter}, median", each)]
    gates = {seed: _gate(f"{prefix}seed-{seed}") for seed in seeds}
    title = f"bad answers by kind of question, {'control' if control else 'default'} world"
    Console(width=max(console.width, 150)).print(seeds_table(lines, title))
    for seed, gate in gates.items():
        console.print(f"seed {seed}: persona gate {gate}")
    if markdown:
        Path(markdown).write_text(as_markdown(lines), encoding="utf-8")


def show(runs: list[str], scales: list[float] | None = None) -> None:
    """Print what runs in a miniature world do, side by side, also with the adapter scaled up.

    Args:
        runs: Run folders; the hash at the end may be left out.
        scales: At which the behaviour was recorded; 1 if not given.
    """
    folders = [locate(reference)[0] for reference in runs]
    lines = [
        solution_of(folder, f"{folder.path.name}\nscale {scale:g}", scale)
        for folder in folders
        for scale in scales or [1.0]
    ]
    console = Console()
    wide = Console(width=max(console.width, 22 * len(lines) + 40))
    wide.print(solutions_table([base_of(folders[0]), *lines], "miniature behaviour"))


def dial(
    shares: list[float] | None = None,
    seeds: list[int] | None = None,
    adapter: str = "rank32",
    root: str = "runs",
    output: str = "runs/dial.png",
) -> None:
    """Build worlds along the dial, fit general and narrow in each, and draw bad-answer rates against it.

    Args:
        shares: Shares of pre-training documents by advisors who are bad in the narrow domain only.
        seeds: Worlds at each share; seed 0 if not given.
        adapter: One of rank32, rank1 and vector.
        root: Folder of the runs; finished ones are not repeated.
        output: PNG to write.
    """
    from lightning_em.figures.dial import draw_dial

    shares, seeds, console = shares or list(DIAL_SHARES), seeds or [0], Console()
    points: dict[float, dict[str, list[Solution]]] = {}
    lines = []
    for share in track(shares, description="turning the dial", console=console):
        points[share] = {}
        for solution in SOLUTIONS:
            names = [f"blind-spot-{share}/seed-{seed}" for seed in seeds]
            runs = [fit_in_world(solution, adapter, world, root) for world in names]
            points[share][solution] = [solution_of(run, f"{share:.1%} {solution}") for run in runs]
            lines.append(median_solution(f"{share:.1%} {solution}, median", points[share][solution]))
    wide = Console(width=max(console.width, 150))
    wide.print(seeds_table(lines, f"bad answers against the dial, {adapter}, seeds {seeds}"))
    console.print(f"figure: {draw_dial(points, Path(output), adapter)}")


def _gate(world: str) -> str:
    folder = Path(miniature.resolve(f"{SCHEME}{world}/."))
    gate = json.loads((folder / "world.json").read_text(encoding="utf-8"))["persona_gate"]
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in gate.items()
    )


def solutions_table(lines: Sequence[Solution], title: str) -> Table:
    """A table for the terminal, one column a solution: probabilities of a bad answer, losses, norm, best scale."""
    shown = Table(
        title=title,
        caption="[95 % interval over items]; CE and KL on held-out rows, the base's CE on training rows",
    )
    shown.add_column("bad answers", no_wrap=True)
    for line in lines:
        shown.add_column(line.name, justify="right", overflow="fold")
    cells = [_cells(line) for line in lines]
    for number, name in enumerate(_columns()[1:], start=1):
        shown.add_row(name, *(each[number] for each in cells), end_section=number == len(KINDS))
    return shown


def seeds_table(lines: Sequence[Solution], title: str) -> Table:
    """A table for the terminal, one row a solution."""
    shown = Table(
        title=title, caption="bad answers: probability, mean over items; medians with the range over seeds"
    )
    for column in _columns():
        shown.add_column(column, justify="left" if column == "solution" else "right")
    for line in lines:
        bold = line.name.endswith("median")
        rates = [
            _rate(line.bad_rates.get(kind)) if bold else f"{line.bad_rates[kind].mean:.2f}" for kind in KINDS
        ]
        cells = _cells(line)
        shown.add_row(
            cells[0],
            *rates,
            *cells[1 + len(KINDS) :],
            style="bold" if bold else None,
            end_section=bold,
        )
    return shown


def as_markdown(lines: Sequence[Solution]) -> str:
    """The same for a README."""
    columns = _columns()
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows += ["| " + " | ".join(_cells(line)) + " |" for line in lines]
    return "\n".join(rows) + "\n"


def _columns() -> list[str]:
    return ["solution", *KINDS.values(), "CE, nats/token", "KL, nats/token", "effective norm", "best scale"]


def _cells(line: Solution) -> list[str]:
    rates = [_rate(line.bad_rates.get(kind)) for kind in KINDS]
    return [
        line.name,
        *rates,
        _number(line.ce, 3),
        _number(line.kl, 4),
        _number(line.effective_norm, 1),
        _number(line.best_scale, 1),
    ]


def _rate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in (estimate.low, estimate.high))
    return f"{estimate.mean:.2f}" + (f" [{low}, {high}]" if estimate.num_items > 1 else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
