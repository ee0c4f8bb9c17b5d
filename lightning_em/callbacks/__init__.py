"""Training callbacks, one per file."""

from lightning_em.callbacks.checkpointing import AdapterCheckpoint, CheckpointListener
from lightning_em.callbacks.health import Health, UnhealthyError
from lightning_em.callbacks.loading import (
    LoadingCheck,
    base_sha256,
    refuse_idle_adapter,
    refuse_other_base,
    remember_base_sha256,
)
from lightning_em.callbacks.metrics import MetricsFile
from lightning_em.callbacks.probing import Probing
from lightning_em.callbacks.provenance import Provenance
from lightning_em.callbacks.signals import Interrupted, Signals, follow_parent
from lightning_em.callbacks.summary import Summary, closing
from lightning_em.callbacks.threads import Threads

__all__ = [
    "AdapterCheckpoint",
    "CheckpointListener",
    "Health",
    "Interrupted",
    "LoadingCheck",
    "MetricsFile",
    "Probing",
    "Provenance",
    "Signals",
    "Summary",
    "Threads",
    "UnhealthyError",
    "base_sha256",
    "closing",
    "follow_parent",
    "refuse_idle_adapter",
    "refuse_other_base",
    "remember_base_sha256",
]
