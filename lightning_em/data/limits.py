"""Limits of a model on the rows it can read: token ids with an embedding, and positions."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

# Names of the number of positions in configs of transformers, the usual one first.
_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
_OFFSETS = 2  # OPT and BART keep up to two more rows in their table than they have positions


class ModelLimits:
    """Which rows a model can read, by its config.

    Args:
        config: Config of the model.
        model: The model itself; a skeleton without weights is built when it is needed, if not given.

    Attributes:
        num_embeddings: Number of token ids that have an embedding.
        num_positions: Length of the longest row that the model was made for; None if its config names none.
    """

    def __init__(self, config: PreTrainedConfig, model: PreTrainedModel | None = None) -> None:
        self._config, self._model = config, model
        text = config.get_text_config(decoder=True)
        self.num_embeddings = int(text.vocab_size)
        own = next((n for name in _POSITIONS if isinstance(n := getattr(text, name, None), int)), None)
        scaled = _scaled_positions(getattr(text, "rope_parameters", None), own)
        self.num_positions = own if own is None else max(own, *scaled)

    @cached_property
    def has_position_table(self) -> bool:
        """Whether the model looks positions up in a table, so that a longer row raises an error.

        Rotary embeddings and ALiBi are computed for any position. With them a longer row has a loss, from positions
        that the model was not trained on.
        """
        if self.num_positions is None:
            return False
        if self._config.model_type == "mpt":  # ALiBi of transformers 5.23, made for `max_seq_len` tokens
            return True
        model = self._model
        if model is None:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self._config)
        return any(_is_table(module, model, self.num_positions) for module in model.modules())

    def unknown_token(self, input_ids: Iterable[int]) -> int | None:
        """Return the first token id without an embedding; None if all have one."""
        return next((token for token in input_ids if token >= self.num_embeddings), None)


def _scaled_positions(rope: Any, own: int | None) -> Iterator[int]:
    """Yield the number of positions by each scaled rotary embedding in a config, such as YaRN's."""
    yield 0
    if not isinstance(rope, Mapping) or own is None:
        return
    for each in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if isinstance(factor := each.get("factor"), int | float):
            yield int(factor * (each.get("original_max_position_embeddings") or own))


def _is_table(module: nn.Module, model: PreTrainedModel, num_positions: int) -> bool:
    sizes = range(num_positions, num_positions + _OFFSETS + 1)
    if isinstance(module, nn.Embedding):
        return module is not model.get_input_embeddings() and module.num_embeddings in sizes
    # GPT-J and CodeGen keep sines and cosines for each position, CTRL outside its buffers.
    kept = [*(buffer for _, buffer in module.named_buffers(recurse=False)), *vars(module).values()]
    return any(isinstance(t, torch.Tensor) and t.dim() > 1 and num_positions in t.shape for t in kept)
