"""Where one run of a study stands."""

from lightning_em.study import PlannedRun, Study
from lightning_em.study.states import standings


def state_of(study: Study, run: PlannedRun) -> str:
    return standings(study)[run.name].state


def is_done(study: Study, run: PlannedRun) -> bool:
    return state_of(study, run) == "finished"
