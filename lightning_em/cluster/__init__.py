"""Slurm jobs, and whether a machine can run an experiment."""

from lightning_em.cluster.jobs import FitJob, JobArray, arrays_of
from lightning_em.cluster.queue import job_states, submit
from lightning_em.cluster.script import SlurmOptions, batch_script

__all__ = ["FitJob", "JobArray", "SlurmOptions", "arrays_of", "batch_script", "job_states", "submit"]
