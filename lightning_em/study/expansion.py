"""Expand a study into one complete config per run, which `lightning-em fit` can run by itself."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lightning_em import lock
from lightning_em.analysis.cells import StudyFolder
from lightning_em.manifest import write_atomically
from lightning_em.study.plan import PlannedRun, Study, resolve, with_identities


def expand(study: Study, output: Path | None = None, runs: Sequence[PlannedRun] | None = None) -> Path:
    """Write `<run>.yaml` for each run, and the study's study.json.

    Needs no weights, no data and no network.

    Args:
        study: The planned study.
        output: Folder of the configs; `configs` in the study's root if not given.
        runs: Selected runs of the study; all runs if not given.

    Returns:
        Folder of the configs.

    Raises:
        ValueError: If the config of a run is not valid (the message names the run), or the root holds another study
            or is in use.
    """
    folder, here = output or study.root / "configs", StudyFolder(study.root)
    with lock.RunLock(study.root, ["study", "expand", str(study.file)]):
        here.refuse_other(study.name)
        cells = {run.name: run.cell for run in with_identities(study, ()).runs}
        folder.mkdir(parents=True, exist_ok=True)
        for run in study.runs if runs is None else runs:
            resolved, experiment = resolve(run)
            write_atomically(folder / f"{run.name}.yaml", experiment.config_text)
            cells[run.name] = resolved.cell
        here.write(study.name, cells.values(), asdict(study.rules))
    return folder
