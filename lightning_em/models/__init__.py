"""Models: the frozen base, and the base with its adapter."""

from lightning_em.models.adapted import AdaptedModel
from lightning_em.models.generation import Sampling, sample_answers, sample_tokens
from lightning_em.models.pretrained import BaseModel
from lightning_em.models.results import LossSums, RowLosses, StepLoss
from lightning_em.models.store import ActivationStore, StoreOptions

__all__ = [
    "ActivationStore",
    "AdaptedModel",
    "BaseModel",
    "LossSums",
    "RowLosses",
    "Sampling",
    "StepLoss",
    "StoreOptions",
    "sample_answers",
    "sample_tokens",
]
