"""Subcommands besides fit, validate, test and predict, one module per family. Heavy imports wait for the call."""

import importlib
from argparse import ArgumentParser

# Module of each subcommand. Only the module of the requested subcommand is imported.
FAMILIES = {
    "probe": "runs",
    "runs": "runs",
    "data": "data",
    "miniature": "worlds",
    "demo": "worlds",
    "study": "study",
    "import": "exchange",
    "export": "exchange",
    "submit": "cluster",
    "doctor": "cluster",
}


def main(args: list[str]) -> int:
    """Run one of the subcommands with these command-line arguments; returns the exit code."""
    parser = ArgumentParser(prog="lightning-em", allow_abbrev=False)
    family = importlib.import_module(f"{__name__}.{FAMILIES[args[0]]}")
    family.add(parser.add_subparsers(required=True))
    options = vars(parser.parse_args(args))
    return options.pop("call")(**options) or 0
