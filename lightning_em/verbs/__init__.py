"""The verbs beside LightningCLI's, one module a family. Heavy imports wait until a verb runs."""

import importlib
from argparse import ArgumentParser

# Only the family of the verb that was asked for is imported.
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
    """Run one of the verbs with these command-line arguments; returns the exit code."""
    parser = ArgumentParser(prog="lightning-em", allow_abbrev=False)
    family = importlib.import_module(f"{__name__}.{FAMILIES[args[0]]}")
    family.add(parser.add_subparsers(required=True))
    options = vars(parser.parse_args(args))
    return options.pop("call")(**options) or 0
