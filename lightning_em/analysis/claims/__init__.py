"""Claims of the literature and their statistical tests on the measurements of a study."""

from lightning_em.analysis.claims.evidence import Evidence
from lightning_em.analysis.claims.results import ClaimResult, evaluate
from lightning_em.analysis.claims.specs import CLAIMS, Claim
from lightning_em.analysis.claims.verdicts import (
    Criterion,
    Finding,
    MissingError,
    interval,
    judge,
    sign_flip_p,
)

__all__ = [
    "CLAIMS",
    "Claim",
    "ClaimResult",
    "Criterion",
    "Evidence",
    "Finding",
    "MissingError",
    "evaluate",
    "interval",
    "judge",
    "sign_flip_p",
]
