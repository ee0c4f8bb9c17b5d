"""Provenance of a run: config, versions, data hashes and exit status, recorded in the run folder."""

import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_em import __version__, imports, slurm
from lightning_em.callbacks.health import UnhealthyError
from lightning_em.callbacks.loading import base_sha256, refuse_other_base
from lightning_em.callbacks.signals import Interrupted
from lightning_em.manifest import write_atomically
from lightning_em.module import EMModule
from lightning_em.redaction import redacted_text, redacted_words
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "jsonargparse", "safetensors")


class Provenance(Callback):
    """Keep `run.json` up to date: identity, versions, data, attempts and exit status of the run.

    Args:
        identity: Identity of the run; see `identity_of`.
        config: Resolved config as YAML text, written to `config.yaml`.
        command: Command line that reproduces the run.
    """

    def __init__(self, identity: Mapping[str, Any], config: str, command: Sequence[str]) -> None:
        self.identity, self.config, self.command = identity, config, list(command)

    def on_train_start(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Record the start of an attempt before the first step.

        Raises:
            ValueError: If the base model differs from the one that the run started with.
        """
        run = RunFolder(trainer.default_root_dir)
        refuse_other_base(run, pl_module)
        if not trainer.is_global_zero:
            return
        known = run.read_run()
        attempt = {"started": _now(), "from_step": trainer.global_step, "world_size": trainer.world_size}
        if job := slurm.job_id():
            attempt["job"] = job
        # an earlier attempt without a status did not end regularly, so it was killed
        before = [{"status": "killed"} | attempt for attempt in known.get("attempts", [])]
        if not run.config_file.exists():
            write_atomically(run.config_file, self.config)
        elif run.config_file.read_text(encoding="utf-8") != self.config:  # device settings may differ
            write_atomically(run.path / f"config.attempt-{len(before) + 1}.yaml", self.config)
        run.update_run(
            status="running",
            exit_reason=None,
            identity=(known.get("identity") if run.steps() else None)
            or self.identity,  # a resumed run keeps the identity it started with
            attempts=[*before, attempt],
            allowed_imports=imports.allowed(),
            command=redacted_words(self.command),
            versions=versions(),
            git=git_state(),
            base={
                "path": pl_module.base.path,
                "revision": _revision(pl_module),
                "sha256": base_sha256(pl_module.model.base, pl_module.model.adapter),
            },
            data=trainer.datamodule.fingerprint(),  # type: ignore[attr-defined]
            max_steps=int(trainer.estimated_stepping_batches),
        )

    def on_fit_end(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Record that the run finished, or that it stopped before its last step."""
        if trainer.is_global_zero:
            done = trainer.global_step >= trainer.estimated_stepping_batches
            self._close(trainer, "finished" if done else "stopped", None)

    def on_exception(self, trainer: Trainer, pl_module: EMModule, exception: BaseException) -> None:  # type: ignore[override]
        """Record the exception that ended the run."""
        if not trainer.is_global_zero or not RunFolder(trainer.default_root_dir).run_file.exists():
            return
        kind = "preempted" if isinstance(exception, Interrupted) else "failed"
        step = {"failed_at": exception.step} if isinstance(exception, UnhealthyError) else {}
        try:
            self._close(trainer, kind, redacted_text(f"{type(exception).__name__}: {exception}"), **step)
        except OSError as error:  # e.g. a full disk: do not hide the original exception
            logger.warning("could not note in run.json how the run ended: %s", error)

    def _close(self, trainer: Trainer, status: str, reason: str | None, **more: Any) -> None:
        run = RunFolder(trainer.default_root_dir)
        attempts = run.read_run().get("attempts", [])
        end = {"status": status, "ended": _now(), "last_step": trainer.global_step, "exit_reason": reason}
        if attempts:
            attempts[-1] |= end | more
        run.update_run(**end, attempts=attempts)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries that affect the results."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"lightning_em": __version__, "python": platform.python_version(), **found}


def git_state() -> dict[str, Any] | None:
    """Return the git commit of the working directory and whether it has changes; None outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _revision(module: EMModule) -> str | None:
    commit = getattr(module.model.base.config, "_commit_hash", None)
    return commit or module.base.revision


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
