"""The Slurm job that this process is part of: id, signal, way back into the queue. Never imports torch."""

import logging
import os
import signal
import subprocess
import threading

logger = logging.getLogger(__name__)

REQUEUE_SIGNAL = signal.SIGUSR1  # what `#SBATCH --signal=SIGUSR1@90` sends before the time limit
_asked: list[int] = []


def job_id() -> str | None:
    """Id of the job, as `scontrol` and `squeue` take it: `123`, or `123_4` in an array; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often the job has been put back into the queue; Slurm does not start it again while it still runs."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def note_requeue_signal() -> None:
    """In a Slurm job, take note of SIGUSR1 from now on, so that before and after training it kills nothing.

    Installed before the heavy imports, which take longer than some jobs have left. Lightning puts this handler
    back when training is over.
    """
    if job_id() and threading.current_thread() is threading.main_thread():
        signal.signal(REQUEUE_SIGNAL, lambda number, _: _asked.append(number))


def requeue_asked() -> bool:
    """Whether SIGUSR1 has come while nobody but `note_requeue_signal` listened."""
    return bool(_asked)


def requeue_job() -> None:
    """Put this job back into the queue; where that fails, say how to do it by hand."""
    words = ["scontrol", "requeue", str(job_id())]
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603 (Slurm's own id)
        logger.warning("requeued: %s", " ".join(words))
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("could not requeue (%s); submit the job again, it continues from here.", error)
