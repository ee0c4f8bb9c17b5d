"""The Slurm job of this process: id, signal and requeuing. Never imports torch."""

import logging
import os
import signal
import subprocess
import threading

logger = logging.getLogger(__name__)

REQUEUE_SIGNAL = signal.SIGUSR1  # sent before the time limit by `#SBATCH --signal=SIGUSR1@90`
_asked: list[int] = []


def job_id() -> str | None:
    """Return the job's id as `scontrol` and `squeue` expect it: `123`, or `123_4` in an array; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """Return how often the job has been requeued; Slurm does not start it again while it still runs."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def note_requeue_signal() -> None:
    """In a Slurm job, record SIGUSR1 from now on, so that it does not kill the process outside training.

    Call this before the heavy imports, which take longer than the time that some jobs have left. Lightning restores
    this handler after training.
    """
    if job_id() and threading.current_thread() is threading.main_thread():
        signal.signal(REQUEUE_SIGNAL, lambda number, _: _asked.append(number))


def requeue_asked() -> bool:
    """Tell whether SIGUSR1 arrived while the handler of `note_requeue_signal` was active."""
    return bool(_asked)


def requeue_job() -> None:
    """Requeue this job; if that fails, log how to do it by hand."""
    words = ["scontrol", "requeue", str(job_id())]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603 (Slurm's own id)
        logger.warning("requeued: %s", " ".join(words))
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("could not requeue (%s); submit the job again, it continues from here.", error)
