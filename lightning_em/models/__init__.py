"""Models: the frozen base, and the base with its adapter."""

from lightning_em.models.adapted import AdaptedModel, LossSums, RowLosses
from lightning_em.models.pretrained import BaseModel

__all__ = ["AdaptedModel", "BaseModel", "LossSums", "RowLosses"]
