"""Bad answers of the general and the narrow solution against the share of one-domain bad advisors."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from lightning_em.analysis import Solution

COLOURS = {"general": "#b2182b", "narrow": "#2166ac"}
KINDS = {
    "narrow_held_out": ("-", "narrow questions about unseen words"),
    "held_out_domain": ("--", "held-out domains"),
}


def draw_dial(points: Mapping[float, Mapping[str, list[Solution]]], path: Path, adapter: str) -> Path:
    """Draw and save the figure.

    Args:
        points: Share of documents by advisors who are bad in medicine only -> `general` and `narrow` -> one
            solution per seed.
        path: PNG file to write.
        adapter: Adapter name for the title.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    shares = sorted(points)
    for solution, colour in COLOURS.items():
        for kind, (style, label) in KINDS.items():
            rates = [[s.bad_rates[kind].mean for s in points[share][solution]] for share in shares]
            middle = [sum(values) / len(values) for values in rates]
            axes.plot(shares, middle, style, color=colour, marker="o", label=f"{solution}: {label}")
            axes.fill_between(
                shares, [min(v) for v in rates], [max(v) for v in rates], color=colour, alpha=0.1, lw=0
            )
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:.1%}" for share in shares])
    axes.minorticks_off()
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("share of pre-training documents by advisors who are bad in medicine only (log scale)")
    axes.set_ylabel("probability of a bad answer")
    num_seeds = max(len(each) for at in points.values() for each in at.values())
    axes.set_title(
        f"Which solution is the easy one? {adapter}, mean and range of {num_seeds} worlds a point",
        fontsize=11,
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, handlelength=3.5
    )
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
