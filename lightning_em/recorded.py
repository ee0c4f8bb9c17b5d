"""A run as it is on disk, for notebooks: frames at once, the model when it is asked for."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_em.analysis import metrics_frame, records_frame
from lightning_em.runs import RunFolder

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lightning_em.adapters import Adapter
    from lightning_em.module import EMModule


class RecordedRun:
    """One run at one of its checkpoints. Everything is read when it is first asked for, and then kept.

    Made by `lightning_em.runs.load`.

    Args:
        folder: The run's folder.
        step: The checkpoint whose adapter is loaded; metrics and records are those of all steps.
        device: Where the model goes.
        allow_import: Packages beside this one whose classes the run's config may name.
    """

    def __init__(
        self, folder: RunFolder, step: int, device: str = "cpu", allow_import: Sequence[str] = ()
    ) -> None:
        self.folder, self.step, self.device = folder, step, device
        self._allow_import = tuple(allow_import)

    def __repr__(self) -> str:
        return f"RecordedRun({str(self.folder.path)!r}, step={self.step})"

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """Training and validation metrics, one row a step and one column a name."""
        return metrics_frame(self.folder)

    @cached_property
    def records(self) -> "pd.DataFrame":
        """What the probes found at every step, one row a point; columns as in `analysis.records_frame`."""
        return records_frame(self.folder)

    @property
    def model(self) -> "PreTrainedModel":
        """The Hugging Face model with the adapter hooked in, ready for `generate`.

        `with run.adapter.at_scale(0):` is the base.
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

        imports.restrict(self._allow_import)
        return rebuild.load_module(self.folder, self.step).module.eval().to(self.device)
