"""Talking to Slurm: sbatch and squeue. Never imports torch."""

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from lightning_em.cluster.jobs import JobArray
from lightning_em.manifest import write_atomically
from lightning_em.runs import RunFolder

SUBMIT_SECONDS = 60


def submit(array: JobArray, script: str, file: Path, after: str | None = None) -> str:
    """Write a batch file, hand it to sbatch, and note the job in the run.json of every fit in it.

    Args:
        array: The fits.
        script: Text of the batch file.
        file: Where it is kept.
        after: Job array to wait for, each fit for the one of its index.

    Returns:
        The job's id.

    Raises:
        ValueError: If there is no sbatch here, or it refuses the job.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, script)
    waiting = [f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"] if after else []
    words = ["sbatch", "--parsable", *waiting, str(file)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SUBMIT_SECONDS)  # noqa: S603 (ours)
    except FileNotFoundError:
        raise ValueError(
            f"there is no sbatch on this machine; {file} is written: submit it where there is, with {' '.join(words)}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"sbatch did not answer within {SUBMIT_SECONDS} s and may have taken the job all the same: look at `squeue "
            f"--me` before you submit {file} again."
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refused {file}: {(done.stderr or done.stdout).strip()}")
    job = done.stdout.strip().split(";")[0]
    # Before the job can have got as far as its own first line in run.json: that is behind imports of seconds.
    for index, fit in array.jobs.items():
        task = job if "#SBATCH --array=" not in script else f"{job}_{index}"
        _note(RunFolder(fit.folder), task, file)
    return job


def _note(run: RunFolder, job: str, file: Path) -> None:
    submitted = datetime.now(UTC).isoformat(timespec="seconds")
    status = {} if run.read_run().get("attempts") else {"status": "queued"}
    run.update_run(job={"id": job, "submitted": submitted, "script": str(file)}, **status)


def job_states() -> dict[str, str]:
    """State by id of this user's jobs that are in the queue, `123` or `123_4`; empty where there is no Slurm."""
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603 (fixed)
    except (OSError, subprocess.SubprocessError):
        return {}
    states = {}
    for line in done.stdout.splitlines():
        job, state, reason = line.strip().split("|")
        states[job] = state.lower() if reason in ("None", "") else f"{state.lower()} ({reason})"
    return states


def described(job: dict[str, str] | None, states: dict[str, str]) -> str:
    """A run's job for a table: its id, and its state while Slurm knows it."""
    if not job:
        return ""
    number = re.sub(r"\D*$", "", str(job["id"]))
    return f"{number} {states.get(number, '')}".strip()
