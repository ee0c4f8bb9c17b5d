"""Adapters, the trainable part of a model. To add a type, subclass `Adapter` and name the class path in YAML."""

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex, decoder_layers, final_norm
from lightning_em.adapters.lora import LoRA
from lightning_em.adapters.vector import SteeringVector

__all__ = ["Adapter", "LayerIndex", "LoRA", "LowRank", "SteeringVector", "decoder_layers", "final_norm"]
