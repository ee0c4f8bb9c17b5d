"""Train and study narrow and general fine-tuning solutions of chat models."""

from importlib import import_module
from typing import Any

__all__ = ["Experiment", "__version__", "load_run"]
__version__ = "0.1.0"

_MODULES = {"Experiment": "experiment", "load_run": "recorded"}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that importing the package loads no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
