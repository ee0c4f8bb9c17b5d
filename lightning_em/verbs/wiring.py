"""How a verb family puts its verbs on the command line."""

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


def verb(verbs: Any, name: str, call: Callable[..., int | None], text: str) -> ArgumentParser:
    """Add a verb; its options have the names of the parameters of `call`, whose result is the exit code.

    Args:
        verbs: What `add_subparsers` gave.
        name: The word on the command line.
        call: Runs the verb.
        text: What it does, for --help.
    """
    parser: ArgumentParser = verbs.add_parser(
        name, help=text, description=text, epilog=EVERYWHERE, allow_abbrev=False
    )
    parser.set_defaults(call=partial(_call, parser, call))
    return parser


def _call(parser: ArgumentParser, call: Callable[..., int | None], **options: Any) -> int | None:
    """Run a verb, unless a word that it would hand on to `fit` was meant for itself."""
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
    """Name a verb's own flags in errors about the keys of an experiment, which the verb does not have.

    Args:
        flags: What to say instead of what, e.g. `{"model.base.path": "--base"}`.
    """
    try:
        yield
    except ValueError as error:
        text = str(error)
        for key, flag in flags.items():
            text = text.replace(key, flag)
        raise ValueError(text) from error


def lazily(module: str, function: str) -> Callable[..., int | None]:
    """A function of a module that is imported when the function is called: heavy imports wait until then."""

    def call(**options: Any) -> int | None:
        result: int | None = getattr(importlib.import_module(module), function)(**options)
        return result

    return call
