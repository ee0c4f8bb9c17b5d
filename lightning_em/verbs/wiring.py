"""How a verb family puts its verbs on the command line."""

import importlib
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from rich.console import Console

console = Console()


def verb(verbs: Any, name: str, call: Callable[..., int | None], text: str) -> ArgumentParser:
    """Add a verb; its options have the names of the parameters of `call`, whose result is the exit code.

    Args:
        verbs: What `add_subparsers` gave.
        name: The word on the command line.
        call: Runs the verb.
        text: What it does, for --help.
    """
    parser: ArgumentParser = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(call=call)
    return parser


def lazily(module: str, function: str) -> Callable[..., int | None]:
    """A function of a module that is imported when the function is called: heavy imports wait until then."""

    def call(**options: Any) -> int | None:
        result: int | None = getattr(importlib.import_module(module), function)(**options)
        return result

    return call
