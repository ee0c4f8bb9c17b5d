"""Talking to Slurm: sbatch and squeue. Never imports torch."""

import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_em.cluster.jobs import JobArray
from lightning_em.manifest import write_atomically
from lightning_em.runs import RunFolder

SUBMIT_SECONDS = 60


def submit(array: JobArray, script: str, file: Path, after: str | None = None) -> str:
    """Write a batch file, hand it to sbatch, and note the job in the run.json of every fit in it.

    The job is held until all is noted: a fit that had started would write into the same run.json.

    Args:
        array: The fits.
        script: Text of the batch file.
        file: Where it is kept.
        after: Job array to wait for, each fit for the one of its index.

    Returns:
        The job's id.

    Raises:
        ValueError: If there is no sbatch here, it refuses the job, or the job is held and could not be released.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, script)
    waiting = [f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"] if after else []
    words = ["sbatch", "--parsable", "--hold", *waiting, str(file)]
    try:
        done = _run(words)
    except FileNotFoundError:
        raise ValueError(
            f"there is no sbatch on this machine; {file} is written: submit it where there is, with "
            f"sbatch {shlex.join([*waiting, str(file)])}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"sbatch did not answer within {SUBMIT_SECONDS} s and may have taken the job all the same: look at `squeue "
            f"--me` before you submit {file} again; it would be held."
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refused {file}: {(done.stderr or done.stdout).strip()}")
    job = done.stdout.strip().splitlines()[-1].split(";")[0]  # a site's own remarks may come before
    try:
        for index, fit in array.jobs.items():
            _note(RunFolder(fit.folder), job if "#SBATCH --array=" not in script else f"{job}_{index}", file)
    except OSError as error:
        raise ValueError(
            f"job {job} is held, for it could not be noted in its run folders ({error}): let it run with `scontrol "
            f"release {job}`, or take it back with `scancel {job}`."
        ) from error
    if "#SBATCH --hold" not in script.splitlines():
        _release(job)
    return job


def _release(job: str) -> None:
    words = ["scontrol", "release", job]
    try:
        done = _run(words)
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        problem = said if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"job {job} is submitted but held: {problem}. Let it go with `{' '.join(words)}`.")


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=SUBMIT_SECONDS)  # noqa: S603 (ours)


def _note(run: RunFolder, job: str, file: Path) -> None:
    submitted = datetime.now(UTC).isoformat(timespec="seconds")
    status = {} if run.read_run().get("attempts") else {"status": "queued"}
    run.update_run(job={"id": job, "submitted": submitted, "script": str(file)}, **status)


def job_states() -> dict[str, str] | None:
    """State by id of this user's jobs that are in the queue, `123` or `123_4`; None where Slurm does not answer."""
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603 (fixed)
    except (OSError, subprocess.SubprocessError):
        return None
    states = {}
    for line in done.stdout.splitlines():
        job, state, reason = line.strip().split("|", 2)
        states[job] = state.lower() if reason in ("None", "") else f"{state.lower()} ({reason})"
    return states


def job_of(record: Mapping[str, Any]) -> str | None:
    """Id of a run's latest job, by its run.json: the one it was submitted as, or the one that a fit found itself in."""
    noted, attempt = record.get("job") or {}, (record.get("attempts") or [{}])[-1]
    started_later = attempt.get("started", "") >= noted.get("submitted", "")
    job = attempt["job"] if attempt.get("job") and started_later else noted.get("id")
    return None if job is None else str(job)


def described(job: str | None, states: Mapping[str, str] | None) -> str:
    """A run's job for a table: its id, and its state while Slurm knows it."""
    return "" if job is None else f"{job} {(states or {}).get(job, '')}".strip()


def status_in_queue(status: str, job: str | None, states: Mapping[str, str] | None) -> str:
    """A run's status, with `gone` for `queued` where Slurm answers and does not know its job any more."""
    return "gone" if status == "queued" and states is not None and job not in states else status
