"""PEFT folders: LoRAs on any modules, and vectors in the two forms that an unmodified peft loads exactly."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lightning_em.exchange.peft_lora import PREFIX, ForeignLoRA, factor_of, lora_config, lora_of
from lightning_em.exchange.placement import skeleton, stream_site
from lightning_em.exchange.vector import Vector, checked_vector

PeftType = Literal["beft", "lora_bias"]


def read_peft(
    settings: Mapping[str, Any], tensors: dict[str, Tensor], config: PreTrainedConfig, source: str, base: str
) -> ForeignLoRA | Vector:
    """Read the content of a PEFT folder: a LoRA, or a vector in a form of `write_peft_vector`.

    Args:
        settings: Content of adapter_config.json.
        tensors: Content of adapter_model.safetensors.
        config: Config of the base model that the adapter is used with.
        source: Name of the folder, for messages.
        base: Name of the base model, for messages.

    Raises:
        ValueError: If it is another kind of adapter, uses a feature that our LoRA does not have, or does not fit the
            base model.
    """
    # The state dict of a PeftModel has the name of the adapter in its names; peft's own files leave it out.
    plain = {
        re.sub(r"(\.lora_[AB])\.[^.]+\.(weight|bias)$", r"\1.\2", name): t for name, t in tensors.items()
    }
    if len(plain) < len(tensors):
        raise ValueError(
            f"{source} holds several adapters, {sorted(tensors)[:4]} ...; save the one to import alone."
        )
    tensors = plain
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds numbers that are not finite.")
    kind = settings.get("peft_type")
    if kind == "BEFT":
        return _vector_of(tensors, {"beft_bias"}, 1.0, config, source)
    if kind != "LORA":
        raise ValueError(
            f"{source}/{ADAPTER_CONFIG}: peft_type is {kind!r}; expected LORA, or BEFT for a vector."
        )
    if settings.get("lora_bias"):
        lora = lora_config(settings, source, frozenset({"lora_bias"}))
        _refuse_low_rank_part(tensors, source)
        return _vector_of(
            tensors, {"lora_A.weight", "lora_B.weight", "lora_B.bias"}, factor_of(lora), config, source
        )
    return lora_of(lora_config(settings, source), tensors, config, source, base)


def write_peft_vector(
    folder: Path, vector: Vector, config: PreTrainedConfig, peft_type: PeftType, base: str | None
) -> None:
    """Write a vector as the bias of the linear module whose output is added to the residual stream.

    Args:
        folder: Existing folder to write into.
        vector: Vector to write.
        config: Config of the base model.
        peft_type: `beft`: one tensor, multiplied by alpha (peft 0.20 or newer); `lora_bias`: bias of a LoRA
            whose A and B are zero, with alpha kept separately (peft 0.14 or newer).
        base: Name of the base model for adapter_config.json; None for a local folder.

    Raises:
        ValueError: If the architecture has no module whose bias is equivalent to the vector.
    """
    site = stream_site(config, vector.layer)
    name = f"{PREFIX}{site}"
    if peft_type == "beft":
        tensors = {f"{name}.beft_bias": vector.shift()[None].contiguous()}
        settings: dict[str, Any] = {"peft_type": "BEFT", "init_weights": True}
    else:
        width = skeleton(config).get_parameter(f"{site}.weight").shape[1]
        tensors = {
            f"{name}.lora_A.weight": torch.zeros(1, width),
            f"{name}.lora_B.weight": torch.zeros(len(vector.values), 1),
            f"{name}.lora_B.bias": vector.values,
        }
        settings = _lora_settings(1, vector.alpha, False) | {"lora_bias": True}
    _write(folder, tensors, settings | {"target_modules": [site]}, base)


def write_peft_lora(
    folder: Path, tensors: dict[str, Tensor], written: Mapping[str, Any], base: str | None
) -> None:
    """Write the LoRA of a checkpoint. Its config leaves out defaults and paths of this machine.

    Args:
        folder: Existing folder to write into.
        tensors: Tensors of the checkpoint.
        written: Content of the checkpoint's adapter_config.json.
        base: Name of the base model for adapter_config.json; None for a local folder.
    """
    settings = _lora_settings(written["r"], written["lora_alpha"], written["use_rslora"])
    if written.get("fan_in_fan_out"):  # Conv1D modules, as in GPT-2
        settings["fan_in_fan_out"] = True
    _write(folder, tensors, settings | {"target_modules": sorted(written["target_modules"])}, base)


def _write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], base: str | None) -> None:
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    shared = {"base_model_name_or_path": base, "inference_mode": True, "task_type": "CAUSAL_LM"}
    text = json.dumps(shared | settings, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _lora_settings(rank: int, alpha: float, rslora: bool) -> dict[str, Any]:
    whole = int(alpha) if float(alpha).is_integer() else alpha  # peft declares lora_alpha as an integer
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": whole,
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _refuse_low_rank_part(tensors: Mapping[str, Tensor], source: str) -> None:
    factors = [t for name, t in tensors.items() if name.endswith(("lora_A.weight", "lora_B.weight"))]
    if len(factors) == 2 and all(factor.any() for factor in factors):
        raise ValueError(
            f"{source}: lora_bias: true, with A and B that are not zero; it is supported for a vector alone (A or B "
            "zero), and lightning_em.adapters.LoRA has no biases."
        )


def _vector_of(
    tensors: Mapping[str, Tensor], endings: set[str], alpha: float, config: PreTrainedConfig, source: str
) -> Vector:
    """Convert the only bias in the folder to a vector."""
    names = {name: re.fullmatch(r"(.+?\.(\d+)\..+)\.(beft_bias|lora_[AB]\.\w+)", name) for name in tensors}
    sites = {match[1] for match in names.values() if match}
    if not all(names.values()) or len(sites) != 1 or {m[3] for m in names.values() if m} != endings:
        raise ValueError(
            f"{source}/{ADAPTER_WEIGHTS}: expected {', '.join(sorted(endings))} of one module, got {sorted(tensors)}."
        )
    [site] = sites
    layer = next(int(match[2]) for match in names.values() if match)
    bias = next(t for name, t in tensors.items() if name.endswith("bias"))
    vector = checked_vector(bias.flatten(), layer, alpha, source)
    if layer >= config.get_text_config(decoder=True).num_hidden_layers:
        return vector  # the caller's `refuse_misfit` reports that the layer does not exist
    if site != f"{PREFIX}{(place := stream_site(config, layer))}":
        raise ValueError(
            f"{source}: a bias of {site.removeprefix(PREFIX)} is not a shift of the residual stream; expected {place}."
        )
    return vector
