"""Train and study narrow and general fine-tuning solutions of chat models."""

__version__ = "0.1.0"
