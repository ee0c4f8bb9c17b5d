"""Probes: what is measured at a checkpoint. A new one is one subclass of `Probe`, named by its class path."""

from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.probes.behaviour import MiniatureBehaviour
from lightning_em.probes.perturbation import PerturbationCurve
from lightning_em.probes.scale import ScaleCurve

__all__ = ["MiniatureBehaviour", "PerturbationCurve", "Probe", "ProbeExamples", "ScaleCurve"]
