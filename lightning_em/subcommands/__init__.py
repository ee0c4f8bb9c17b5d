"""Subcommands besides fit, validate, test and predict, one module per family. Heavy imports wait for the call."""

import importlib
from argparse import ArgumentParser

# Module of each subcommand. Only the module of the requested subcommand is imported. Those of the miniature and
# of the small real model are named here as text: nothing else imports these packages.
FAMILIES = {
    "probe": "lightning_em.subcommands.runs",
    "runs": "lightning_em.subcommands.runs",
    "sample": "lightning_em.subcommands.sample",
    "data": "lightning_em.subcommands.data",
    "miniature": "lightning_em.miniature.subcommands",
    "demo": "lightning_em.subcommands.demo",
    "smollm2": "lightning_em.smollm2.subcommands",
    "study": "lightning_em.subcommands.study",
    "import": "lightning_em.subcommands.exchange",
    "export": "lightning_em.subcommands.exchange",
    "submit": "lightning_em.subcommands.cluster",
    "doctor": "lightning_em.subcommands.cluster",
}


def main(args: list[str]) -> int:
    """Run one of the subcommands with these command-line arguments; returns the exit code."""
    parser = ArgumentParser(prog="lightning-em", allow_abbrev=False)
    family = importlib.import_module(FAMILIES[args[0]])
    family.add(parser.add_subparsers(required=True))
    options = vars(parser.parse_args(args))
    return options.pop("call")(**options) or 0
