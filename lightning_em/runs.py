"""The layout of a run folder, and the way back into one. Never imports torch by itself."""

import importlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_em import lock, records
from lightning_em.manifest import MANIFEST, manifest_problems, write_atomically

if TYPE_CHECKING:
    from lightning_em.recorded import RecordedRun

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d+)")
_HASH = re.compile(r"-[0-9a-f]{8}")


class RunFolder:
    """Everything about one run, and nothing outside it.

    Args:
        path: The run's folder; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.run_file = self.path / "run.json"
        self.console_log = self.path / "console.log"
        self.probe_folder = self.path / "probes"

    def probe_file(self, probe: str) -> Path:
        """Where the records of one probe are."""
        return self.probe_folder / f"{probe}.jsonl"

    def probe_results(self) -> Iterator[records.ProbeResult]:
        """Every record of every probe."""
        for file in sorted(self.probe_folder.glob("*.jsonl")):
            yield from records.read_results(file)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimiser steps; it need not exist."""
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of all published checkpoints, ascending; valid or not."""
        names = (p.name for p in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ()
        return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))

    def newest_valid_step(self) -> int | None:
        """The last checkpoint whose files match their manifest; broken ones are passed over aloud."""
        for step in reversed(self.steps()):
            problems = manifest_problems(self.checkpoint(step))
            if not problems:
                return step
            logger.warning("checkpoint step %d is broken and passed over: %s", step, "; ".join(problems))
        return None

    def last_adapter_sha256(self) -> str | None:
        """Hash of the weights in the last checkpoint that has a manifest, as it is written there; None without one."""
        found = (adapter_sha256(self.checkpoint(step)) for step in reversed(self.steps()))
        return next((sha256 for sha256 in found if sha256 is not None), None)

    def read_run(self) -> dict[str, Any]:
        """Content of run.json; empty before the run has started."""
        if not self.run_file.exists():
            return {}
        content: dict[str, Any] = json.loads(self.run_file.read_text(encoding="utf-8"))
        return content

    def status(self) -> str:
        """`running`, `finished`, `stopped`, `preempted`, `failed`, `imported`, or `killed`: running, but by nobody."""
        status = str(self.read_run().get("status"))
        return "killed" if status == "running" and not lock.is_held(self.path) else status

    def update_run(self, **fields: Any) -> None:
        """Change some fields of run.json in one step."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = self.read_run() | fields
        write_atomically(self.run_file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def adapter_sha256(checkpoint: Path) -> str | None:
    """Hash of a checkpoint's adapter weights, from its manifest; None if that tells none."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return str(listing["adapter_model.safetensors"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def step_of(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint folder, from its name."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def locate(reference: str) -> tuple[RunFolder, Path]:
    """Run folder and checkpoint named by `runs/x` (its newest valid one) or `runs/x@step-40`.

    The hash that ends a run's name may be left out where only one run has that name.

    Raises:
        ValueError: If there is no such run or checkpoint, or it fails its manifest.
    """
    path, _, wanted = reference.partition("@")
    run = RunFolder(path)
    if not run.path.is_dir():
        run = RunFolder(_named(run.path))
    if not wanted:
        step = run.newest_valid_step()
        if step is None:
            raise ValueError(f"{path} has no valid checkpoint under {run.checkpoints}.")
        return run, run.checkpoint(step)
    match = _STEP_FOLDER.fullmatch(wanted)
    if not match or int(match[1]) not in run.steps():
        raise ValueError(
            f"{path} has no checkpoint {wanted!r}; it has steps {run.steps()}. Write {path}@step-N."
        )
    folder = run.checkpoint(int(match[1]))
    if problems := manifest_problems(folder):
        raise ValueError(f"checkpoint {folder} is broken: {'; '.join(problems)}")
    return run, folder


def load(reference: str | Path, device: str = "cpu", allow_import: Sequence[str] = ()) -> "RecordedRun":
    """A run for a notebook: metrics and records as pandas frames, the model with its adapter on request.

    Args:
        reference: `runs/x` for its newest valid checkpoint, `runs/x@step-40` for another.
        device: Where the model goes.
        allow_import: Packages of your own that the run's config names classes of.

    Raises:
        ValueError: If there is no such run or checkpoint.
    """
    # This floor knows nothing of the ones above; going up by name keeps torch and pandas out until somebody asks.
    recorded = importlib.import_module("lightning_em.recorded")
    run, checkpoint = locate(str(reference))
    found: RecordedRun = recorded.RecordedRun(run, step_of(checkpoint), device, allow_import)
    return found


def _named(path: Path) -> Path:
    """The one folder called `path` and eight hexadecimal characters."""
    parent = path.parent
    found = sorted(f for f in parent.glob(f"{path.name}-*") if _HASH.fullmatch(f.name[len(path.name) :]))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"there is no run folder {str(path)!r} (looked from {Path.cwd()}).")
    raise ValueError(f"{path} may be {', '.join(f.name for f in found)}; write one of them.")
