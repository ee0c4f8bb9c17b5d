"""Subcommand `demo`: a general and a narrow solution in one command, on a real chat model or in the miniature world."""

import importlib
from typing import Any

from lightning_em.subcommands.wiring import add_subcommand


def add(subcommands: Any) -> None:
    """Add the subcommand to the parser."""
    demo = add_subcommand(
        subcommands, "demo", run, "a general and a narrow solution in one command, side by side"
    )
    demo.add_argument("--root", default="runs", help="folder of the runs")
    demo.add_argument(
        "--base", help="hub id or folder of another copy of the weights of SmolLM2-135M-Instruct"
    )
    demo.add_argument(
        "--miniature", action="store_true", help="in the miniature world, a toy, within a minute"
    )
    demo.add_argument("--seed", type=int, help="seed of the miniature world; default 0")


def run(root: str, base: str | None, miniature: bool, seed: int | None) -> None:
    """Run the demo; see `lightning_em.smollm2.demo.demo` and `lightning_em.miniature.demo.demo`.

    Args:
        root: Folder of the runs.
        base: Hub id or folder of another copy of the weights of SmolLM2-135M-Instruct.
        miniature: Whether to run the toy instead.
        seed: Seed of the miniature world.

    Raises:
        ValueError: If an option belongs to the other demo.
    """
    # Named as text: nothing outside these packages imports them.
    if miniature:
        if base is not None:
            raise ValueError("--base is for the demo on SmolLM2; leave out --miniature, or --base.")
        importlib.import_module("lightning_em.miniature.demo").demo(root, seed or 0)
    else:
        if seed is not None:
            raise ValueError("--seed chooses a world of the miniature; add --miniature, or leave --seed out.")
        importlib.import_module("lightning_em.smollm2.demo").demo(root, base)
