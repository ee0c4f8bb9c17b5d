"""Helpers with which a family of subcommands adds itself to the parser."""

import difflib
import importlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from lightning_em.errors import EVERYWHERE

console = Console()


def add_subcommand(subcommands: Any, name: str, call: Callable[..., int | None], text: str) -> ArgumentParser:
    """Add a subcommand. Its options must have the names of the parameters of `call`.

    Args:
        subcommands: Result of `add_subparsers`.
        name: Name of the subcommand.
        call: Function that runs the subcommand and returns the exit code; None counts as 0.
        text: Description for `--help`.

    Returns:
        Parser of the subcommand, to which the caller adds options.
    """
    parser: ArgumentParser = subcommands.add_parser(
        name, help=text, description=text, epilog=EVERYWHERE, allow_abbrev=False
    )
    parser.set_defaults(call=partial(_call, parser, call))
    return parser


def _call(parser: ArgumentParser, call: Callable[..., int | None], **options: Any) -> int | None:
    """Run a subcommand; refuse an argument for `fit` that is a misspelled option of the subcommand itself."""
    own = [flag.removeprefix("--").partition(".") for flag in parser._option_string_actions if "." in flag]
    for word in options.get("args", ()):
        group, _, name = word.removeprefix("--").partition("=")[0].partition(".")
        if word.startswith("--") and (names := [option for other, _, option in own if other == group]):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean --{group}.{near[0]}?" if near else f"--{group} has {', '.join(names)}."
            raise ValueError(f"there is no option --{group}.{name}. {hint}")
    return call(**options)


@contextmanager
def in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Replace config keys in error messages with the options of a subcommand.

    Args:
        flags: Option for each key, such as `{"model.base.path": "--base"}`.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for key, flag in flags.items():
            text = text.replace(key, flag)
        raise ValueError(text) from error


def lazily(module: str, function: str) -> Callable[..., int | None]:
    """Wrap a function so that its module is imported at the first call, which keeps `--help` fast."""

    def call(**options: Any) -> int | None:
        result: int | None = getattr(importlib.import_module(module), function)(**options)
        return result

    return call
