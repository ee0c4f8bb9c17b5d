"""A recorded run for notebooks: metrics and records as data frames, and the model, each loaded on first access."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_em.analysis import metrics_frame, records_frame
from lightning_em.runs import RunFolder, locate, step_of

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightning_em.adapters import Adapter
    from lightning_em.module import EMModule


def load_run(reference: str | Path, device: str = "cpu", allow_import: Sequence[str] = ()) -> "RecordedRun":
    """Open a run: metrics and records as pandas data frames, and the model with its adapter on first access.

    Args:
        reference: Name of a run or checkpoint: `runs/x` for its newest valid checkpoint, `runs/x@step-40` for another.
        device: Device of the model.
        allow_import: Packages, in addition to this one, whose classes the run's config may name.

    Raises:
        ValueError: If there is no such run or checkpoint.
    """
    folder, checkpoint = locate(str(reference))
    return RecordedRun(folder, step_of(checkpoint), device, allow_import)


class RecordedRun:
    """One run at one of its checkpoints. Each attribute is loaded on first access and then kept.

    Returned by `lightning_em.load_run` and `Experiment.fit`.

    Args:
        folder: Folder of the run.
        step: Step of the checkpoint whose adapter is loaded; None if the run has no checkpoint. Metrics and records
            are those of all steps.
        device: Device of the model.
        allow_import: Packages, in addition to this one, whose classes the run's config may name.
    """

    def __init__(
        self, folder: RunFolder, step: int | None, device: str = "cpu", allow_import: Sequence[str] = ()
    ) -> None:
        self.folder, self.step, self.device = folder, step, device
        self._allow_import = tuple(allow_import)

    def __repr__(self) -> str:
        return f"RecordedRun({str(self.folder.path)!r}, step={self.step})"

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """Training and validation metrics, with one row per step and one column per metric."""
        return metrics_frame(self.folder)

    @cached_property
    def records(self) -> "pd.DataFrame":
        """Probe records of all steps, with one row per point; columns as in `analysis.records_frame`."""
        return records_frame(self.folder)

    @property
    def model(self) -> "PreTrainedModel":
        """The Hugging Face model with the adapter attached, ready for `generate`.

        Inside `with run.adapter.at_scale(0):` it is the base model.
        """
        base: PreTrainedModel = self._module.model.base
        return base

    @property
    def adapter(self) -> "Adapter":
        """The adapter of this checkpoint; it acts on `model`."""
        return self._module.model.adapter

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, with its chat template."""
        return self._module.base.load_tokenizer()

    @cached_property
    def _module(self) -> "EMModule":
        from lightning_em import imports, rebuild

        if self.step is None:
            raise ValueError(f"{self.folder.path} has no valid checkpoint under {self.folder.checkpoints}.")
        imports.restrict([*imports.allowed(), *self._allow_import])
        return rebuild.load_module(self.folder, self.step).module.eval().to(self.device)
