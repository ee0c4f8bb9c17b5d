"""Models: the base model, the base model with an adapter, and the backends that compute losses."""

from lightning_em.models.adapted import AdaptedModel
from lightning_em.models.backend import LossSums, RowLosses, StepLoss
from lightning_em.models.fast import ActivationStore, StoreOptions
from lightning_em.models.generation import Answer, Sampling, sample_answers, sample_tokens
from lightning_em.models.pretrained import BaseModel, with_shared_weights

__all__ = [
    "ActivationStore",
    "AdaptedModel",
    "Answer",
    "BaseModel",
    "LossSums",
    "RowLosses",
    "Sampling",
    "StepLoss",
    "StoreOptions",
    "sample_answers",
    "sample_tokens",
    "with_shared_weights",
]
