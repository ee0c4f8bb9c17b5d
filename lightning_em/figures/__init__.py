"""Figures of analysis results, drawn with matplotlib. Never imports torch."""

from lightning_em.figures.dial import COLOURS, draw_dial
from lightning_em.figures.scale import draw_loss_curves
from lightning_em.figures.weights import draw_weights

__all__ = ["COLOURS", "draw_dial", "draw_loss_curves", "draw_weights"]
