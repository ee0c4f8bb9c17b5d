"""The fast backend: what does not depend on the adapter is computed once, and logits in chunks where they count."""

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
