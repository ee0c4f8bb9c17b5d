"""Interface to Slurm's sbatch and squeue. Never imports torch."""

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
    """Write a batch file, submit it with sbatch, and record the job in the run.json of every fit in it.

    The job is held until all fits are recorded: a fit that had already started would write to the same run.json.

    Args:
        array: Fits to submit.
        script: Text of the batch file.
        file: Path that the batch file is written to.
        after: Id of the job array to wait for; each fit waits for the one with its index.

    Returns:
        Id of the job.

    Raises:
        ValueError: If sbatch is missing or refuses the job, or the job is held and could not be released.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, script)
    waiting = [f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"] if after else []
    words = ["sbatch", "--parsable", "--hold", *waiting, str(file)]
    try:
        done = _run(words)
    except FileNotFoundError:
        raise ValueError(
            f"there is no sbatch on this machine; {file} was written. Submit it on a machine that has sbatch, with "
            f"sbatch {shlex.join([*waiting, str(file)])}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"sbatch did not answer within {SUBMIT_SECONDS} s and may have accepted the job: check `squeue "
            f"--me` before you submit {file} again; the job would be held."
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refused {file}: {(done.stderr or done.stdout).strip()}")
    job = done.stdout.strip().splitlines()[-1].split(";")[0]  # a site's messages may precede the id
    try:
        for index, fit in array.jobs.items():
            _note(RunFolder(fit.folder), job if "#SBATCH --array=" not in script else f"{job}_{index}", file)
    except OSError as error:
        raise ValueError(
            f"job {job} is held, because it could not be recorded in its run folders ({error}): release it with "
            f"`scontrol release {job}`, or cancel it with `scancel {job}`."
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
        raise ValueError(f"job {job} is submitted but held: {problem}. Release it with `{' '.join(words)}`.")


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=SUBMIT_SECONDS)  # noqa: S603 (ours)


def _note(run: RunFolder, job: str, file: Path) -> None:
    submitted = datetime.now(UTC).isoformat(timespec="seconds")
    status = {} if run.read_run().get("attempts") else {"status": "queued"}
    run.update_run(job={"id": job, "submitted": submitted, "script": str(file)}, **status)


def job_states() -> dict[str, str] | None:
    """Return the states of this user's queued jobs by id, `123` or `123_4`; None if Slurm does not answer."""
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
    """Return the id of a run's latest job, from its run.json: the submitted job, or the job of the last attempt."""
    noted, attempt = record.get("job") or {}, (record.get("attempts") or [{}])[-1]
    started_later = attempt.get("started", "") >= noted.get("submitted", "")
    job = attempt["job"] if attempt.get("job") and started_later else noted.get("id")
    return None if job is None else str(job)


def described(job: str | None, states: Mapping[str, str] | None) -> str:
    """Format a run's job for a table: its id, and its state if Slurm knows it."""
    return "" if job is None else f"{job} {(states or {}).get(job, '')}".strip()


def status_in_queue(status: str, job: str | None, states: Mapping[str, str] | None) -> str:
    """Return a run's status; `queued` becomes `gone` if Slurm answers and no longer knows the job."""
    return "gone" if status == "queued" and states is not None and job not in states else status
