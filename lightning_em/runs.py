"""Layout of a run folder, and lookup of runs and checkpoints. Never imports torch."""

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
    """The folder of one run, which contains all of its files.

    Args:
        path: Folder of the run; it need not exist yet.
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
        """Return the file with the records of one probe."""
        return self.probe_folder / f"{probe}.jsonl"

    def probe_results(self) -> Iterator[records.ProbeResult]:
        """Yield all records of all probes."""
        for file in sorted(self.probe_folder.glob("*.jsonl")):
            yield from records.read_results(file)

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` optimizer steps; it need not exist."""
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps of all published checkpoints, valid or not, in ascending order."""
        names = (p.name for p in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ()
        return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))

    def newest_valid_step(self) -> int | None:
        """Return the step of the newest checkpoint whose files match its manifest; None if there is none.

        Skips corrupt checkpoints with a warning.
        """
        for step in reversed(self.steps()):
            problems = manifest_problems(self.checkpoint(step))
            if not problems:
                return step
            logger.warning("checkpoint step %d is corrupt and skipped: %s", step, "; ".join(problems))
        return None

    def read_run(self) -> dict[str, Any]:
        """Read run.json; the result is empty before the run has started."""
        if not self.run_file.exists():
            return {}
        content: dict[str, Any] = json.loads(self.run_file.read_text(encoding="utf-8"))
        return content

    def status(self) -> str:
        """Return the status: `running`, `finished`, `stopped`, `preempted`, `failed`, `imported` or `killed`.

        A run is `killed` if its recorded status is `running`, but no process holds its lock.
        """
        status = str(self.read_run().get("status"))
        return "killed" if status == "running" and not lock.is_held(self.path) else status

    def difference(self, meant: Mapping[str, Any]) -> str | None:
        """Return the reason why this folder holds a run with another identity.

        Args:
            meant: Identity to compare with, as returned by `identity_of`. Its `data` field is ignored; the data files
                are hashed as they are now.

        Returns:
            The reason; None if the identities match, or no identity is recorded.
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
            # the path of the parent checkpoint may change; `_start_difference` compares what it contains
            changed.pop("model.init_from", None)
        if changed:
            return f"another config: {', '.join(f'{key}: {values}' for key, values in changed.items())}"
        return (self.changed_data() or _start_difference(began, now)) if self.steps() else None

    def changed_data(self) -> str | None:
        """Return a message if a data file differs from the one that the run began with; None otherwise.

        Files that do not exist on this machine are not compared.
        """
        recorded = self.read_run().get("identity")
        for name, began in (recorded["data"] if isinstance(recorded, Mapping) else {}).items():
            if (file := Path(name)).is_file() and (now := sha256_once(file)) != began:
                return f"{file} holds other data (sha256 {now[:12]}) than it began with ({began[:12]})"
        return None

    def refuse_other(self, why: str | None) -> None:
        """Raise an error if the folder holds another run.

        Args:
            why: Reason from `difference`; None does nothing.

        Raises:
            ValueError: If `why` is given; the message contains the reason and what to do.
        """
        if why:
            raise ValueError(
                f"{self.path} holds another run ({why}). Remove that folder to run this one there, or give this one "
                "another --run.name (a study: another --root)."
            )

    def update_run(self, **fields: Any) -> None:
        """Change fields of run.json and write the file atomically."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = self.read_run() | fields
        write_atomically(self.run_file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def adapter_sha256(checkpoint: Path) -> str | None:
    """Return the hash of a checkpoint's adapter weights from its manifest; None if the manifest has none."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return str(listing["adapter_model.safetensors"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start_of(reference: str) -> dict[str, Any] | None:
    """Describe the checkpoint that a run with `init_from` set to `runs/x` or `runs/x@step-40` would start from now.

    Returns:
        A dict with the keys `checkpoint` (its folder), `identity` (hash in the name of its run), `step` and
        `adapter_sha256`; None if the checkpoint does not exist on this machine.
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
    """Return `old -> new` by dotted key for each leaf that differs between two nested mappings."""
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
    """Return the hash of a file; cached until the file changes, because runs share their data files."""
    status = file.stat()
    key = (file.absolute(), status.st_mtime_ns, status.st_size)
    if key not in _hashes:
        _hashes[key] = sha256_of(file)
    return _hashes[key]


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint from the name of its folder."""
    return int(checkpoint.name.rsplit("-", 1)[-1])


def locate(reference: str) -> tuple[RunFolder, Path]:
    """Find the run folder and checkpoint named by `runs/x` (its newest valid checkpoint) or `runs/x@step-40`.

    The hash at the end of a run's name may be omitted if only one run has that name.

    Raises:
        ValueError: If there is no such run or checkpoint, or the checkpoint does not match its manifest.
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
    """Find the only folder whose name is that of `path` plus a hyphen and eight hexadecimal characters.

    Raises:
        ValueError: If there is no such folder, or more than one.
    """
    parent = path.parent
    found = sorted(f for f in parent.glob(f"{path.name}-*") if _HASH.fullmatch(f.name[len(path.name) :]))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"there is no run folder {str(path)!r} (looked from {Path.cwd()}).")
    raise ValueError(f"{path} may be {', '.join(f.name for f in found)}; write one of them.")
