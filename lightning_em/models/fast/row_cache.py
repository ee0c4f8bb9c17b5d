"""Hidden states of single rows, read from the activation store, or computed and added to it."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch
from lightning_em.models.fast.cache_key import model_key, numerics, row_key
from lightning_em.models.fast.packing import PACKED
from lightning_em.models.fast.store import ActivationStore

logger = logging.getLogger(__name__)


class RowCache:
    """Looks up each row of a batch in the activation store.

    States are stored by row and not by batch, because each epoch combines rows differently. On a CPU each missing row
    is also computed alone, so that a run's numbers do not depend on the content of the store: see `_fill_groups`.

    Args:
        store: Store of the states.
        base: The base model with the adapter attached.
        adapter: The adapter. The cache key excludes its parameters inside the base model.
    """

    def __init__(self, store: ActivationStore, base: PreTrainedModel, adapter: Adapter) -> None:
        self.store, self.base, self.adapter = store, base, adapter
        self._model_keys: dict[tuple[object, ...], str] = {}

    @property
    def bytes_per_token(self) -> int:
        """Size of the hidden state of one token in bytes."""
        return int(self.base.config.get_text_config(decoder=True).hidden_size) * self.base.dtype.itemsize

    def states(
        self,
        kind: str,
        batch: PackedBatch,
        packed: bool,
        compute: Callable[[Sequence[int]], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the concatenated states of all rows of a batch; compute and store those that are missing.

        Args:
            kind: Kind of states, part of the cache key.
            batch: The rows.
            packed: Whether the model runs on packed rows.
            compute: Maps row indices to the concatenated states of these rows.
            mask: True on the tokens whose states are kept; all tokens if not given.
        """
        device, lengths = self.base.device, list(batch.lengths)
        model = self._model_key(packed, batch.input_ids.device)
        ids = torch.split(batch.input_ids.cpu(), lengths)
        masks = [None] * len(ids) if mask is None else torch.split(mask.cpu(), lengths)
        keys = [row_key(model, kind, *row) for row in zip(ids, masks, strict=True)]
        sizes = [len(own) if kept is None else int(kept.sum()) for own, kept in zip(ids, masks, strict=True)]
        numbers = {key: index for index, key in enumerate(keys)}  # the same row may be in a batch twice
        found = {key: states for key in numbers if (states := self.store.get(key, device)) is not None}
        for group in _fill_groups([index for key, index in numbers.items() if key not in found], device):
            computed = torch.split(compute(group), [sizes[index] for index in group])
            for index, states in zip(group, computed, strict=True):
                self.store.put(keys[index], states)
                found[keys[index]] = states
        return torch.cat([found[key] for key in keys])

    def _model_key(self, packed: bool, device: torch.device) -> str:
        # Autocast may be on in one pass and off in the next, so the settings are read at every call. Hashing the
        # weights takes seconds, so the key is kept for each combination of settings.
        facts = (packed, *numerics(device))
        if facts not in self._model_keys:
            layout = PACKED if packed else str(self.base.config._attn_implementation)
            self._model_keys[facts] = model_key(self.base, self.adapter.trainable().values(), layout)
            logger.info("activation store: %d bytes a token", self.bytes_per_token)
        return self._model_keys[facts]


def _fill_groups(missing: Sequence[int], device: torch.device) -> list[Sequence[int]]:
    """Group the missing rows that are computed together.

    If a row is computed alone, its states are bit-identical for every set of missing rows. A GPU is underused by a
    single row, and rounds differently for each shape. On a GPU, rows are therefore computed alone only if deterministic
    algorithms are enabled.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return [missing] if missing else []
    return [[index] for index in missing]
