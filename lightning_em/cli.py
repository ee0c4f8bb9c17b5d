"""The subcommands fit, validate, test and predict: an experiment from the command line."""

import logging
from typing import cast

from rich.console import Console
from rich.table import Table

from lightning_em import imports, lock
from lightning_em.experiment import Experiment
from lightning_em.logs import log_to_stderr
from lightning_em.parsing import Subcommand


def main(args: list[str]) -> int:
    """Run one of the subcommands with these arguments; returns the exit code."""
    subcommand, *rest = args
    # Info messages are the same on every rank, so only the first rank logs them.
    log_to_stderr(logging.INFO if lock.is_first_rank() else logging.WARNING)
    # Allows only the packages of this command line, not those of an earlier call in this process.
    imports.take(rest)
    experiment = Experiment(rest, cast(Subcommand, subcommand))
    if experiment.subcommand == "fit":
        experiment.fit()
        return 0
    checkpoint, allow_zero = experiment.config["ckpt_path"], bool(experiment.config["allow_zero_adapter"])
    if experiment.subcommand == "predict":
        experiment.predict(checkpoint, allow_zero)
        return 0
    metrics = experiment.evaluate(experiment.subcommand, checkpoint, allow_zero)
    table = Table("quantity", "nats per token", title=checkpoint or "untrained adapter")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.6f}")
    if experiment.trainer is not None and experiment.trainer.is_global_zero:
        Console().print(table)
    return 0
