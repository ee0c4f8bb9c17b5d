"""Contract checks for plug-in authors: each check raises an AssertionError that names the broken law."""

from lightning_em.testing.adapter_laws import check_adapter
from lightning_em.testing.probe_laws import check_probe

__all__ = ["check_adapter", "check_probe"]
