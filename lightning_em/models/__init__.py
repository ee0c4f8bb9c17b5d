"""Models: the frozen base, and the base with its adapter."""

from lightning_em.models.adapted import AdaptedModel, LossSums, RowLosses
from lightning_em.models.generation import Sampling, sample_answers
from lightning_em.models.pretrained import BaseModel

__all__ = ["AdaptedModel", "BaseModel", "LossSums", "RowLosses", "Sampling", "sample_answers"]
