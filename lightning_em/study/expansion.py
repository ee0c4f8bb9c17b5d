"""A study as one whole config a run: nothing left to look up, each runs by itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_em.analysis.cells import StudyFolder
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
        ValueError: If a run's config is none; the message names the run.
    """
    folder = output or study.root / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    StudyFolder(study.root).write(study.name, [run.cell for run in study.runs])
    for run, config in resolved_configs(study.runs if runs is None else runs):
        text = yaml.safe_dump(redacted(config), sort_keys=False)
        write_atomically(folder / f"{run.name}.yaml", text)
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
