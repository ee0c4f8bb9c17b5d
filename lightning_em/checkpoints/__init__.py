"""Checkpoints: adapter-only folders, written atomically through Lightning's CheckpointIO."""

from lightning_em.checkpoints.folder import FolderCheckpointIO

__all__ = ["FolderCheckpointIO"]
