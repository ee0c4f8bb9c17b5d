"""The steering vector: one shift of the residual stream at one layer."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex


class SteeringVector(Adapter):
    """Add `scale x alpha x vector` to the residual stream that leaves one decoder layer.

    The same vector at every position, prompt and generated tokens alike.

    Args:
        layer: Index, or fraction of depth.
        alpha: Multiplies the vector; with a learning rate it sets how fast the shift grows.

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
        """The hidden states `[..., hidden]`, each moved by the same vector."""
        return hidden + (self.scale * self.alpha * self.vector).to(hidden)

    def update(self) -> list[LowRank]:
        """The shift alpha x vector of the stream that enters the layer above."""
        return [LowRank(self.lowest_layer, "vector", factor=self.alpha)]
