"""Adapters from elsewhere as runs, and runs' adapters as files that other programs load."""

from lightning_em.exchange.card import CANARY
from lightning_em.exchange.exporting import FORMATS, ExportFormat, export_run
from lightning_em.exchange.importing import DataOptions, import_run
from lightning_em.exchange.peft_folder import PeftType

__all__ = ["CANARY", "FORMATS", "DataOptions", "ExportFormat", "PeftType", "export_run", "import_run"]
