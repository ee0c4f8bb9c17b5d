"""Run probes on every published checkpoint."""

import json
import logging
from collections.abc import Callable
from functools import partial
from typing import cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy

from lightning_em.callbacks.loading import base_sha256
from lightning_em.callbacks.signals import stop_between
from lightning_em.data import EMDataModule
from lightning_em.models import AdaptedModel
from lightning_em.module import EMModule
from lightning_em.probes import Probe, ProbeExamples
from lightning_em.records import append_lines, read_results
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)


class Probing(Callback):
    """Run probes on each checkpoint after it has been written; emergency saves are not probed.

    Args:
        probes: Probes to run; none by default.
        num_examples: Number of training rows of each stream that probes read; the same rows at every checkpoint.
        batch_size: Rows in one forward pass.
        every_n_steps: Steps between probed checkpoints; 0 probes every checkpoint. The last one is always probed.
    """

    def __init__(
        self,
        probes: list[Probe] | None = None,
        num_examples: int = 64,
        batch_size: int = 16,
        every_n_steps: int = 0,
    ) -> None:
        self.probes = probes or []
        self.num_examples, self.batch_size, self.every_n_steps = num_examples, batch_size, every_n_steps

    def on_checkpoint_published(self, trainer: Trainer, module: EMModule, step: int) -> None:
        """Run the probes that have no record for this step yet."""
        if self.every_n_steps and step % self.every_n_steps and step < trainer.estimated_stepping_batches:
            return
        data = cast(EMDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        run, between = RunFolder(trainer.default_root_dir), partial(stop_between, trainer, module)
        self.measure(run, module.model, data, step, trainer.strategy, between)

    def on_train_start(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Run the missing probes of the checkpoint that the run resumes from, if it was killed before they ran."""
        run, step = RunFolder(trainer.default_root_dir), trainer.global_step
        if step in run.steps():
            self.on_checkpoint_published(trainer, pl_module, step)

    def measure(
        self,
        run: RunFolder,
        model: AdaptedModel,
        data: EMDataModule,
        step: int,
        ranks: Strategy | None = None,
        between: Callable[[], None] | None = None,
    ) -> int:
        """Run the probes whose records of `step` are missing, on every rank; rank zero writes.

        Args:
            run: Run folder that the records are written to.
            model: Model with the adapter of that step.
            data: Source of the examples.
            step: Number of optimizer steps of the adapter.
            ranks: Strategy that connects the ranks; None in a single process.
            between: Called before each probe on every rank. It may raise: missing probes are run on resume.

        Returns:
            Number of probes that were run.
        """
        examples = self.examples(data).to(model.base.device)
        missing = [i for i, probe in enumerate(self.probes) if not recorded(run, probe, examples, step)]
        if (
            ranks is not None
        ):  # all ranks must run the same probes: forward passes of a sharded base are collective
            missing = ranks.broadcast(missing)
        base = base_sha256(model.base, model.adapter)
        row_hashes = {str(stream): data.rows(stream).sha256() for stream in data.sources}
        for probe in (self.probes[i].for_checkpoint(run, step) for i in missing):
            if between is not None:
                between()
            result = probe.record(model, examples, step, base, row_hashes)
            logger.info("%s at step %d: %d points", probe.name, step, len(result.points))
            if ranks is None or ranks.is_global_zero:
                append_lines(run.probe_file(result.probe), result.to_json())
        return len(missing)

    def examples(self, data: EMDataModule) -> ProbeExamples:
        """Return the rows that every checkpoint is measured on."""
        kl = data.probe_batches("kl", self.num_examples, self.batch_size) if data.rows("kl").rows else []
        narrow = data.probe_batches("narrow", self.num_examples, self.batch_size)
        return ProbeExamples(narrow, kl, data.encoder)


def recorded(run: RunFolder, probe: Probe, examples: ProbeExamples, step: int) -> bool:
    """Tell whether a record of this step exists, measured with the same settings on the same rows."""
    own = examples.only(probe.reads)
    wanted = (step, json.loads(json.dumps(probe.settings())), own.narrow_row_ids, own.kl_row_ids)
    return any(
        (result.step, result.settings, result.examples, result.kl_examples) == wanted
        for result in read_results(run.probe_file(probe.name))
    )
