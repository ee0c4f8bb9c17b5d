"""Verbs about the embedded miniature world: miniature build, table, show, dial, and demo."""

from typing import Any

from lightning_em.verbs.wiring import console, lazily, verb

_DEMO = "lightning_em.demo"


def add(verbs: Any) -> None:
    """Put the verbs of this family on the command line."""
    worlds = verbs.add_parser("miniature", help="the embedded miniature world").add_subparsers(required=True)
    build = verb(worlds, "build", build_world, "build a world unless it is there, and say where it is")
    build.add_argument("--seed", type=int, default=0, help="of words, documents and initial weights")
    world = build.add_mutually_exclusive_group()
    world.add_argument(
        "--control", action="store_true", help="advisors bad in medicine only are as common as careless ones"
    )
    world.add_argument(
        "--blind_spot_share", type=float, help="share of documents by an advisor bad in one domain"
    )
    build.add_argument("--force", action="store_true", help="build it again")
    _add_measuring(worlds)
    demo = verb(verbs, "demo", lazily(_DEMO, "demo"), "the miniature study in one command")
    demo.add_argument("--root", default="runs", help="folder of the runs")
    demo.add_argument("--seed", type=int, default=0, help="world to use")


def _add_measuring(worlds: Any) -> None:
    """The verbs that fit in several worlds and show what came of it."""
    text = "fit general and narrow adapters in several worlds, print bad-answer rates"
    table = verb(worlds, "table", lazily(_DEMO, "table"), text)
    table.add_argument("--seeds", type=int, nargs="*", help="worlds; default 0 1 2 3 4")
    table.add_argument("--adapters", nargs="*", help="of rank32, rank1, vector; default all")
    table.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    table.add_argument("--control", action="store_true", help="in the control world")
    table.add_argument("--markdown", help="also write the table to this file")
    text = "what runs in a miniature world do, side by side, also scaled up"
    shown = verb(worlds, "show", lazily(_DEMO, "show"), text)
    shown.add_argument("runs", nargs="+", help="runs/x; the hash at the end may be left out")
    shown.add_argument("--scales", type=float, nargs="*", help="recorded scales; default 1")
    text = "general and narrow rates against the share of one-domain bad advisors"
    dial = verb(worlds, "dial", lazily(_DEMO, "dial"), text)
    dial.add_argument(
        "--shares", type=float, nargs="*", help="of documents; default 0.005 0.015 0.03 0.06 0.12"
    )
    dial.add_argument("--seeds", type=int, nargs="*", help="worlds at each share; default 0")
    dial.add_argument("--adapter", default="rank32", choices=["rank32", "rank1", "vector"])
    dial.add_argument("--root", default="runs", help="folder of the runs; finished ones are not repeated")
    dial.add_argument("--output", default="runs/dial.png", help="PNG to write")


def build_world(
    seed: int = 0, control: bool = False, blind_spot_share: float | None = None, force: bool = False
) -> None:
    """Build a miniature world unless it is there already, and say where it is.

    Args:
        seed: Of words, documents and initial weights.
        control: The world in which advisors bad in medicine only are as common as careless ones.
        blind_spot_share: Share of pre-training documents by an advisor who is bad in the narrow domain only.
        force: Build it again.
    """
    from lightning_em import miniature
    from lightning_em.logs import hush

    hush()
    if control and blind_spot_share is not None:
        raise ValueError("the control world has a share of its own: --control or --blind_spot_share.")
    recipe = miniature.Recipe.control() if control else miniature.Recipe.default()
    if blind_spot_share is not None:
        recipe = recipe.with_blind_spot_share(blind_spot_share)
    folder = miniature.build(recipe, seed, force=force)
    console.print((folder / "world.json").read_text(encoding="utf-8"))
    console.print(str(folder))
