"""Adapters: what is trained. A new type is one subclass of `Adapter`, named in YAML by its class path."""

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex, decoder_layers, final_norm
from lightning_em.adapters.lora import LoRA
from lightning_em.adapters.vector import SteeringVector

__all__ = ["Adapter", "LayerIndex", "LoRA", "LowRank", "SteeringVector", "decoder_layers", "final_norm"]
