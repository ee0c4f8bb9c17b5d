"""The steering vector: a constant shift of the residual stream at one layer."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex


class SteeringVector(Adapter):
    """Add `scale x alpha x vector` to the residual stream that leaves one decoder layer.

    The same vector is added at every position, in the prompt and in generated tokens.

    Args:
        layer: Index of the layer, or fraction of depth.
        alpha: Factor on the vector; together with the learning rate it determines how fast the shift grows.

    Source: arXiv:2602.07852 (steering vector).
    """

    def __init__(self, layer: LayerIndex, alpha: float = 256.0) -> None:
        super().__init__()
        self.layer, self.alpha = layer, alpha

    def attach(self, base: PreTrainedModel) -> None:
        layer = self.resolve(base, self.layer)
        hidden_size = base.config.get_text_config(decoder=True).hidden_size
        self.vector = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        self.edit_output_of(layer, self.shift)

    def shift(self, hidden: Tensor) -> Tensor:
        """Add the scaled vector to hidden states `[..., hidden]`."""
        return hidden + (self.scale * self.alpha * self.vector).to(hidden)

    def update(self) -> list[LowRank]:
        """Return the shift alpha x vector of the residual stream that enters the next layer."""
        return [LowRank(self.lowest_layer, "vector", factor=self.alpha)]
