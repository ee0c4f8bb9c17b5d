"""Losses as sums in nats with token counts, and the objective that combines them."""

from lightning_em.losses.functional import (
    TokenSum,
    cross_entropy,
    kl_from_reference,
    token_cross_entropy,
    token_kl,
)
from lightning_em.losses.objective import LossTerms, LossWeights, Objective
from lightning_em.losses.schedules import Constant, HoldKL, KLWeightSchedule, OffAt, OnAt, Ramp

__all__ = [
    "Constant",
    "HoldKL",
    "KLWeightSchedule",
    "LossTerms",
    "LossWeights",
    "Objective",
    "OffAt",
    "OnAt",
    "Ramp",
    "TokenSum",
    "cross_entropy",
    "kl_from_reference",
    "token_cross_entropy",
    "token_kl",
]
