"""Runs of one adapter, world and seed, and one model into which the adapter of any of them is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import yaml
from torch import Tensor

from lightning_em.analysis.cells import Cell, StudyFolder
from lightning_em.batch import PackedBatch
from lightning_em.callbacks import refuse_other_base
from lightning_em.manifest import manifest_problems
from lightning_em.models import AdaptedModel
from lightning_em.rebuild import LoadedRun, rebuild_run
from lightning_em.runs import RunFolder


class RunGroup:
    """Finished runs by role, and their base model, which is loaded once, on first use.

    Args:
        runs: Run folders by role. The role `narrow` is required: measurements use its data.

    Raises:
        ValueError: If the runs differ in their base model or adapter settings, or one has no valid checkpoint.
    """

    def __init__(self, runs: Mapping[str, RunFolder]) -> None:
        self.runs = dict(runs)
        self._refuse_differences()
        self.last_steps = {role: _last_step(run) for role, run in self.runs.items()}

    @cached_property
    def _loaded(self) -> LoadedRun:
        # An adapter that learned nothing is a valid result in a study.
        loaded = rebuild_run(str(self.runs["narrow"].path), allow_zero_adapter=True)
        for run in self.runs.values():
            refuse_other_base(run, loaded.module)
        loaded.module.eval()
        return loaded

    def model_of(self, role: str, step: int | None = None) -> AdaptedModel:
        """The shared model, with the adapter of one run loaded into it; replaces the adapter of the last call.

        Args:
            role: Role of the run.
            step: Step of the checkpoint; the newest valid one if not given.
        """
        model = self._loaded.module.model
        model.adapter.load(self.runs[role].checkpoint(self.last_steps[role] if step is None else step))
        return model

    def parameters_of(self, role: str, step: int | None = None) -> dict[str, Tensor]:
        """The adapter's parameters under the names they are saved with, as float64 on the CPU."""
        trainable = self.model_of(role, step).adapter.trainable()
        return {name: parameter.detach().cpu().double() for name, parameter in trainable.items()}

    def steps(self, role: str) -> Iterator[int]:
        """Yield the steps of a run's valid checkpoints."""
        run = self.runs[role]
        return (step for step in run.steps() if not manifest_problems(run.checkpoint(step)))

    def narrow_rows(self, num_examples: int, batch_size: int) -> list[PackedBatch]:
        """Batches of narrow training rows: the first of the rows that the probes draw from."""
        rows = self._loaded.data.probe_batches("narrow", num_examples, batch_size)
        return [batch.to(self._loaded.module.device) for batch in rows]

    def parallel_rows(self, num_examples: int, batch_size: int) -> list[PackedBatch]:
        """Batches of the KL rows of the narrow run; empty if it has no KL data."""
        if not self._loaded.data.rows("kl").rows:
            return []
        rows = self._loaded.data.probe_batches("kl", num_examples, batch_size)
        return [batch.to(self._loaded.module.device) for batch in rows]

    def _refuse_differences(self) -> None:
        settings = {}
        for role, run in self.runs.items():
            model = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["model"]
            settings[role] = {"model.base": model["base"], "model.adapter": model["adapter"]}
        for role, found in settings.items():
            for key, value in settings["narrow"].items():
                if found[key] != value:
                    raise ValueError(
                        f"the {role} run {self.runs[role].path} has {key} {found[key]}, the narrow run {value}: "
                        "pairs are compared on one base with one adapter type."
                    )


def by_role(study: StudyFolder, cells: Iterable[Cell], roles: Iterable[str]) -> dict[str, RunFolder]:
    """Run folders of the cells that have one of the roles, in the order of the roles.

    Raises:
        ValueError: If two cells have the same role.
    """
    cells = list(cells)
    found: dict[str, RunFolder] = {}
    for role in roles:
        playing = [cell for cell in cells if cell.role == role]
        if len(playing) > 1:
            raise ValueError(
                f"one adapter, world and seed has two runs with role {role}: {[cell.run for cell in playing]}; "
                "give one of the arms another role."
            )
        if playing:
            found[role] = study.run(playing[0])
    return found


def _last_step(run: RunFolder) -> int:
    step = run.newest_valid_step()
    if step is None:
        raise ValueError(f"{run.path} has no valid checkpoint under {run.checkpoints}.")
    return step
