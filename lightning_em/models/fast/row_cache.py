"""Hidden states of single rows, from the store or computed and put there."""

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
    """Looks the rows of a batch up one by one.

    Rows and not batches are the unit, since every epoch puts other rows together. On a CPU each missing row is also
    computed alone, so that a run's numbers do not depend on what the store happens to hold: see `_fill_groups`.

    Args:
        store: Where the states are kept.
        base: The base model with the adapter attached.
        adapter: The adapter; its parameters inside the base are left out of the key.
    """

    def __init__(self, store: ActivationStore, base: PreTrainedModel, adapter: Adapter) -> None:
        self.store, self.base, self.adapter = store, base, adapter
        self._model_keys: dict[tuple[object, ...], str] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one hidden state."""
        return int(self.base.config.get_text_config(decoder=True).hidden_size) * self.base.dtype.itemsize

    def states(
        self,
        kind: str,
        batch: PackedBatch,
        packed: bool,
        compute: Callable[[Sequence[int]], Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """States of every row of a batch, end to end.

        Args:
            kind: Which states, for the key.
            batch: The rows.
            packed: Whether the model runs on packed rows.
            compute: Returns the states of the rows with these numbers, end to end.
            mask: Which tokens have a state; all if not given.
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
        # Looked up at every use: autocast may be on in one pass and off in the next. Hashing the weights takes
        # seconds, so it is done once for each way to compute.
        facts = (packed, *numerics(device))
        if facts not in self._model_keys:
            layout = PACKED if packed else str(self.base.config._attn_implementation)
            self._model_keys[facts] = model_key(self.base, self.adapter.trainable().values(), layout)
            logger.info("activation store: %d bytes a token", self.bytes_per_token)
        return self._model_keys[facts]


def _fill_groups(missing: Sequence[int], device: torch.device) -> list[Sequence[int]]:
    """Rows that are computed together for the store.

    Alone, a row's states are the same to the bit whichever others are missing. A GPU would idle over one row, and
    rounds differently for each shape anyway: there a row is alone only if deterministic algorithms are asked for.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return [missing] if missing else []
    return [[index] for index in missing]
