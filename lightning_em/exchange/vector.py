"""A steering vector, independent of file formats."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig


class Vector(NamedTuple):
    """A vector that adds `alpha x values` to the residual stream after a decoder layer.

    Attributes:
        values: Trained values, float32 `[hidden]`.
        layer: Index of the decoder layer.
        alpha: Factor of the values.
    """

    values: Tensor
    layer: int
    alpha: float

    def shift(self) -> Tensor:
        """Return the vector that is added to the stream, rounded like the adapter rounds it."""
        return self.alpha * self.values


def checked_vector(values: Any, layer: Any, alpha: Any, source: str) -> Vector:
    """Build a vector from the contents of a file.

    Args:
        values: Expected to be a finite tensor of one dimension.
        layer: Expected to be the index of a layer.
        alpha: Expected to be a finite number.
        source: Origin of the values, for error messages.

    Raises:
        ValueError: If an argument is not as expected.
    """
    found = values
    if isinstance(values, Tensor):
        found = f"a tensor of shape {tuple(values.shape)} and type {values.dtype}"
        if values.dim() == 1 and values.numel() and values.is_floating_point():
            if not torch.isfinite(values).all():
                raise ValueError(f"{source}: the steering vector holds numbers that are not finite.")
            return Vector(
                values.detach().cpu().float().contiguous(),
                _layer(layer, source),
                _factor(alpha, source),
            )
    elif values is not None:
        found = f"a {type(values).__name__}"
    raise ValueError(
        f"{source}: expected a steering vector as floating point numbers [d_model], got {found}."
    )


def refuse_misfit(vector: Vector, config: PreTrainedConfig, source: str, base: str) -> None:
    """Check that a vector fits the model it is to steer.

    Raises:
        ValueError: If its length is not the model's hidden size, or the model has no such layer.
    """
    text = config.get_text_config(decoder=True)
    if len(vector.values) != text.hidden_size:
        raise ValueError(
            f"{source} holds a vector of {len(vector.values)} numbers, but the residual stream of {base} has "
            f"{text.hidden_size}; give --base the model it was trained on."
        )
    if vector.layer >= text.num_hidden_layers:
        raise ValueError(
            f"{source} steers layer {vector.layer}, but {base} has {text.num_hidden_layers} layers; "
            "give --base the model it was trained on."
        )


def _layer(value: Any, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{source}: expected a layer's index from 0, got {value!r}.")
    return value


def _factor(value: Any, source: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{source}: expected a finite number as alpha, got {value!r}.")
    return float(value)
