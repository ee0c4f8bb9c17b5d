"""The miniature world: the embedded default."""

from pathlib import Path


def resolve(path: str) -> str | Path:
    """Local path of a `miniature://` path, built on first use; other paths come back as they are."""
    return path


__all__ = ["resolve"]
