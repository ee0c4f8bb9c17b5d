"""Studies: arms x adapters x seeds from one file. Importing this package loads no torch."""

from lightning_em.study.plan import PlannedRun, Study, read_study, run_name, with_identities

__all__ = ["PlannedRun", "Study", "read_study", "run_name", "with_identities"]
