"""Studies: arms x adapters x seeds as data, run to the end whatever happens. Importing it is light."""

from lightning_em.study.plan import PlannedRun, Study, read_study, run_name, with_identities

__all__ = ["PlannedRun", "Study", "read_study", "run_name", "with_identities"]
