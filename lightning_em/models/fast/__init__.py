"""The fast backend: hidden states below the adapter are computed once, and logits in chunks at counted tokens only."""

from lightning_em.models.fast.backend import CONCAT_TOKENS, PART_TOKENS, FastBackend, FastOptions
from lightning_em.models.fast.store import ActivationStore, StoreOptions

__all__ = [
    "CONCAT_TOKENS",
    "PART_TOKENS",
    "ActivationStore",
    "FastBackend",
    "FastOptions",
    "StoreOptions",
]
