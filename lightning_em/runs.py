"""The layout of a run folder, and lookup of runs and checkpoints. Never imports torch."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_em import lock, records
from lightning_em.manifest import MANIFEST, manifest_problems, sha256_of, write_atomically

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d+)")
_HASH = re.compile(r"-[0-9a-f]{8}")
_hashes: dict[tuple[Path, int, int], str] = {}


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

    def difference(self, meant: Mapping[str, Any]) -> str | None:
        """Why the run in this folder is not the one that is meant; None if it is, or nothing is on record.

        Args:
            meant: An identity, as `identity_of` makes it; `data` is read from the files that are here now.
        """
        recorded = self.read_run().get("identity")
        if recorded is None:
            return None
        if not isinstance(recorded, Mapping):
            return "an older version made it, and its run.json does not say what it is"
        changed = changed_fields(recorded["config"], meant["config"])
        if recorded["name"] != meant["name"] and not changed:
            return "another config: a value that is not shown"
        began, now = recorded["start"], meant["start"]
        if began and now and self.steps():
            changed.pop("model.init_from", None)  # where the parent lies does not matter, but what it is
        if changed:
            return f"another config: {', '.join(f'{key}: {values}' for key, values in changed.items())}"
        return (self.changed_data() or _start_difference(began, now)) if self.steps() else None

    def changed_data(self) -> str | None:
        """Which data file holds other data than the run began with; files that are not here are not judged."""
        recorded = self.read_run().get("identity")
        for name, began in (recorded["data"] if isinstance(recorded, Mapping) else {}).items():
            if (file := Path(name)).is_file() and (now := sha256_once(file)) != began:
                return f"{file} holds other data (sha256 {now[:12]}) than it began with ({began[:12]})"
        return None

    def refuse_other(self, why: str | None) -> None:
        """Refuse to go on in this folder if there is a reason.

        Raises:
            ValueError: The reason, and what to do.
        """
        if why:
            raise ValueError(
                f"{self.path} holds another run ({why}). Remove that folder to run this one there, or give this one "
                "another --run.name (a study: another --root)."
            )

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


def start_of(reference: str) -> dict[str, Any] | None:
    """What a run that starts from `runs/x` or `runs/x@step-40` begins with now; None if that is not here.

    Returns:
        `checkpoint`: its folder; `identity`: the name's hash of its run; `step`; `adapter_sha256`.
    """
    path, _, wanted = reference.partition("@")
    try:
        run = RunFolder(path if Path(path).is_dir() else _named(Path(path)))
    except ValueError:
        return None
    for step in reversed(run.steps()):
        checkpoint = run.checkpoint(step)
        if wanted in ("", f"step-{step}", checkpoint.name) and (sha256 := adapter_sha256(checkpoint)):
            identity = run.read_run().get("identity")
            name = identity["name"] if isinstance(identity, Mapping) else None
            return {"checkpoint": str(checkpoint), "identity": name, "step": step, "adapter_sha256": sha256}
    return None


def _start_difference(began: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    if not began or not now:
        return None
    name = Path(now["checkpoint"]).parent.parent.name
    for key, what in (("identity", "run"), ("step", "step"), ("adapter_sha256", "adapter")):
        if began[key] != now[key]:
            values = "" if key == "adapter_sha256" else f" ({began[key]} -> {now[key]})"
            return f"it began with another {what} than {name} has now{values}"
    return None


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """`old -> new` by dotted key, for every leaf that differs between two nested mappings."""
    old, new = _leaves(before), _leaves(now)
    return {
        key: f"{old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.rstrip("."): value}
    return {k: v for name, each in value.items() for k, v in _leaves(each, f"{prefix}{name}.").items()}


def sha256_once(file: Path) -> str:
    """Hash of a file, read again only if it has been written since: runs share their data files."""
    status = file.stat()
    key = (file.absolute(), status.st_mtime_ns, status.st_size)
    if key not in _hashes:
        _hashes[key] = sha256_of(file)
    return _hashes[key]


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


def _named(path: Path) -> Path:
    """The one folder called `path` and eight hexadecimal characters."""
    parent = path.parent
    found = sorted(f for f in parent.glob(f"{path.name}-*") if _HASH.fullmatch(f.name[len(path.name) :]))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"there is no run folder {str(path)!r} (looked from {Path.cwd()}).")
    raise ValueError(f"{path} may be {', '.join(f.name for f in found)}; write one of them.")
