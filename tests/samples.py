"""Rows and adapted models that several tests share."""

from collections.abc import Iterable
from typing import Any

import torch

from lightning_em.adapters import Adapter, LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.models import AdaptedModel
from tests.oracle import Row
from tests.tiny import VOCAB_SIZE, make_tiny_model


def make_rows(*lengths: int, seed: int = 0) -> list[Row]:
    """Random rows; each has a prompt, an answer, another user turn and, if it is long enough, another answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        rows.append((ids, [2 <= position < 6 or position >= 8 for position in range(length)]))
    return rows


def pack(rows: list[Row], name: str = "row") -> PackedBatch:
    return PackedBatch.from_rows([EncodedRow(*row, f"{name}-{index}") for index, row in enumerate(rows)])


def adapted(
    adapter: Adapter,
    architecture: str = "qwen2",
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    exact: bool = False,
    **settings: Any,
) -> AdaptedModel:
    """A tiny model whose adapter has random values, as after training.

    Args:
        adapter: Not attached yet.
        architecture: One of `tests.tiny.ARCHITECTURES`.
        dtype: Of the base.
        size: Of the random values; 0 leaves the adapter untrained.
        exact: Make the adapter's parameters float64 too, so that nothing is rounded.
        settings: Of `AdaptedModel`.
    """
    model = AdaptedModel(make_tiny_model(architecture, dtype), adapter, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.trainable().values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
        if exact:
            parameter.data = parameter.data.double()
    return model


ADAPTERS = {
    "vector": lambda: SteeringVector(1, alpha=4.0),
    "last_vector": lambda: SteeringVector(2, alpha=4.0),
    "rank_1": lambda: LoRA(1, 16.0, ["down_proj"], [0.5]),
    "rank_32": lambda: LoRA(32, 64.0, ["down_proj"], [1], rslora=True),
    "all_linear": lambda: LoRA(
        4, 8.0, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ),
}


def vector_config(
    alpha: float = 4.0,
    layer: int = 2,
    class_path: str = "lightning_em.adapters.SteeringVector",
    has_update: bool = True,
) -> dict[str, Any]:
    """The `adapter_config.json` of a steering vector that enters a layer."""
    part = {"site": layer, "write": "vector", "read": None, "factor": alpha}
    return {
        "class_path": class_path,
        "init_args": {"layer": layer - 1, "alpha": alpha},
        "lowest_layer": layer,
        "shapes": {},
        "update": [part] if has_update else None,
    }


def lora_config(sites: Iterable[str], factor: float) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA on modules, as far as analysis reads it."""
    parts = [
        {
            "site": site,
            "write": f"base_model.model.{site}.lora_B.weight",
            "read": f"base_model.model.{site}.lora_A.weight",
            "factor": factor,
        }
        for site in sites
    ]
    record = vector_config(class_path="lightning_em.adapters.LoRA") | {"update": parts}
    return {"peft_type": "LORA", "auto_mapping": {"lightning_em": record}}
