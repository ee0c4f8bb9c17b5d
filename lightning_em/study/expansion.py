"""A study as one whole config a run: nothing left to look up, each runs by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_em import lock
from lightning_em.analysis.cells import StudyFolder
from lightning_em.identity import identity_of
from lightning_em.manifest import write_atomically
from lightning_em.rebuild import resolved_config
from lightning_em.redaction import redacted
from lightning_em.study.plan import PlannedRun, Study


def expand(study: Study, output: Path | None = None, runs: Sequence[PlannedRun] | None = None) -> Path:
    """Write `<run>.yaml` for each run, and the study's study.json.

    Needs neither weights nor data nor a network.

    Args:
        study: The plan.
        output: Folder of the configs; `configs` in the study's root if not given.
        runs: Some of its runs; all if not given.

    Returns:
        The folder.

    Raises:
        ValueError: If a run's config is none, which the message names, or another study is in this root or at work
            there.
    """
    folder, here = output or study.root / "configs", StudyFolder(study.root)
    cells = {run.name: run.cell for run in study.runs}
    with lock.RunLock(study.root, ["study", "expand", str(study.file)]):
        here.refuse_other(study.name)
        folder.mkdir(parents=True, exist_ok=True)
        for run, config in resolved_configs(study.runs if runs is None else runs):
            text = yaml.safe_dump(redacted(config), sort_keys=False)
            write_atomically(folder / f"{run.name}.yaml", text)
            # a run of this config has other words on record than those that are planned
            assert run.cell.plan is not None
            cells[run.name] = replace(run.cell, plan=replace(run.cell.plan, identity=identity_of(config)))
        here.write(study.name, cells.values(), asdict(study.rules))
    return folder


def resolved_configs(runs: Sequence[PlannedRun]) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
    """Each run with its whole config, parsed as `lightning-em fit` does.

    Raises:
        ValueError: If the words of a run make no config; the message names the run.
    """
    for run in runs:
        try:
            config = resolved_config(run.words)
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
        yield run, {key: value for key, value in config.items() if key != "config"}
