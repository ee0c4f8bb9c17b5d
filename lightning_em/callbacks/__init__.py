"""Callbacks: what happens around training, each in its own file."""

from lightning_em.callbacks.checkpointing import AdapterCheckpoint, CheckpointListener
from lightning_em.callbacks.metrics import MetricsFile, read_metrics
from lightning_em.callbacks.probing import Probing
from lightning_em.callbacks.provenance import Provenance

__all__ = ["AdapterCheckpoint", "CheckpointListener", "MetricsFile", "Probing", "Provenance", "read_metrics"]
