"""Probes: measurements of a model at a checkpoint. A new probe is one subclass of `Probe`, named by class path."""

from lightning_em.probes.answers import AnswerRates
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans
from lightning_em.probes.chat_kl import ChatKL
from lightning_em.probes.gradient import GradientNorm, ce_gradient, kl_gradient
from lightning_em.probes.lens import LogitLens
from lightning_em.probes.perturbation import PerturbationCurve
from lightning_em.probes.preference import PreferenceMargin
from lightning_em.probes.rotation import Rotation
from lightning_em.probes.scale import ScaleCurve
from lightning_em.probes.significance import PretrainingSignificance

__all__ = [
    "AnswerRates",
    "ChatKL",
    "GradientNorm",
    "LogitLens",
    "PerturbationCurve",
    "PreferenceMargin",
    "PretrainingSignificance",
    "Probe",
    "ProbeExamples",
    "Rotation",
    "RowMeans",
    "ScaleCurve",
    "ce_gradient",
    "kl_gradient",
]
