"""Subcommands for the embedded miniature world: `miniature build`, `table`, `show` and `dial`."""

from pathlib import Path
from typing import Any

from lightning_em.subcommands.wiring import add_subcommand, console, lazily

_DEMO = "lightning_em.miniature.demo"


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    worlds = subcommands.add_parser("miniature", help="the embedded miniature world").add_subparsers(
        required=True
    )
    build = add_subcommand(
        worlds, "build", build_world, "train a world on this machine and compare it with the shipped one"
    )
    build.add_argument("--seed", type=int, default=0, help="of words, documents and initial weights")
    world = build.add_mutually_exclusive_group()
    world.add_argument(
        "--control", action="store_true", help="advisors bad in medicine only are as common as careless ones"
    )
    world.add_argument(
        "--blind_spot_share", type=float, help="share of documents by an advisor bad in one domain"
    )
    build.add_argument("--force", action="store_true", help="train it again")
    build.add_argument("--ship", metavar="DIR", help="also write the two files that the package ships")
    _add_measuring(worlds)


def _add_measuring(worlds: Any) -> None:
    """Add the subcommands that fit adapters in several worlds or compare runs."""
    text = "fit general and narrow adapters in several worlds, print bad-answer rates"
    table = add_subcommand(worlds, "table", lazily(_DEMO, "table"), text)
    table.add_argument("--seeds", type=int, nargs="*", help="worlds; default 0 to 9")
    table.add_argument("--adapters", nargs="*", help="of rank32, rank1, vector; default all")
    table.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    table.add_argument("--control", action="store_true", help="in the control world")
    table.add_argument("--built", action="store_true", help="in worlds trained here, not in the shipped ones")
    table.add_argument("--markdown", help="also write the tables to this file")
    text = "what runs in a miniature world do, side by side, also scaled up"
    shown = add_subcommand(worlds, "show", lazily(_DEMO, "show"), text)
    shown.add_argument("runs", nargs="+", help="runs/x; the hash at the end may be left out")
    shown.add_argument("--scales", type=float, nargs="*", help="recorded scales; default 1")
    text = "general and narrow rates against the share of one-domain bad advisors"
    dial = add_subcommand(worlds, "dial", lazily(_DEMO, "dial"), text)
    dial.add_argument(
        "--shares", type=float, nargs="*", help="of documents; default 0.005 0.015 0.03 0.06 0.12"
    )
    dial.add_argument("--seeds", type=int, nargs="*", help="worlds at each share; default 0")
    dial.add_argument("--adapter", default="rank32", choices=["rank32", "rank1", "vector"])
    dial.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    dial.add_argument("--output", default="runs/dial.png", help="PNG to write")


def build_world(
    seed: int = 0,
    control: bool = False,
    blind_spot_share: float | None = None,
    force: bool = False,
    ship: str | None = None,
) -> None:
    """Train a miniature world on this machine if it is not built yet, and compare it with the shipped one.

    Args:
        seed: Seed of words, documents and initial weights.
        control: Whether to build the control world, in which advisors who are bad in medicine only are as common as
            careless ones.
        blind_spot_share: Share of pre-training documents by an advisor who is bad in the narrow domain only.
        force: Whether to train the world again if it is built already.
        ship: Folder for the weights and facts in the form in which the package ships them; not written if not given.
    """
    from lightning_em import miniature
    from lightning_em.logs import filter_expected_messages

    filter_expected_messages()
    if control and blind_spot_share is not None:
        raise ValueError("the control world has a share of its own: --control or --blind_spot_share.")
    recipe = miniature.Recipe.control() if control else miniature.Recipe.default()
    if blind_spot_share is not None:
        recipe = recipe.with_blind_spot_share(blind_spot_share)
    folder = miniature.build(recipe, seed, force=force)
    console.print((folder / "world.json").read_text(encoding="utf-8"))
    console.print(str(folder))
    from lightning_em.miniature.building import distance
    from lightning_em.miniature.building import ship as write_shipped
    from lightning_em.miniature.corpus import World

    if miniature.find_shipped(recipe, seed):
        found = distance(folder, miniature.provide(recipe, seed), World(recipe, seed))
        console.print(
            f"distance from the shipped world: weights {found.weights:.1%} of their norm; P(good answer) "
            f"{found.behaviour:.4f} on the evaluation items and {found.persona:.4f} on those of the persona gate "
            "(mean absolute difference)"
        )
    if ship is not None:
        console.print(f"shipped files: {write_shipped(folder, Path(ship))}")
