"""Read the LoRA of a PEFT folder: the settings that affect its output, and the modules that peft attaches it to."""

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lightning_em.adapters import LoRA
from lightning_em.exchange.placement import path_of_layers, skeleton

PREFIX = "base_model.model."
# Settings that do not affect the output of a trained LoRA, or are read elsewhere: names, training settings, and
# settings that the names of the tensors repeat.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Other initializations, such as "pissa" and "olora", change the weights of the base model.
_HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_PLACING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


class ForeignLoRA(NamedTuple):
    """A LoRA from a PEFT folder in this package's terms.

    Attributes:
        init_args: Arguments of `lightning_em.adapters.LoRA`.
        tensors: Tensors by name; peft and this package use the same names.
    """

    init_args: dict[str, Any]
    tensors: dict[str, Tensor]


def lora_config(
    settings: Mapping[str, Any], source: str, besides: frozenset[str] = frozenset()
) -> LoraConfig:
    """Extract the settings that affect the output of a LoRA.

    Args:
        settings: Content of adapter_config.json.
        source: Name of the folder, for messages.
        besides: Settings that the caller handles itself.

    Raises:
        ValueError: If a setting needs more than a product B A added to frozen weights; the message names the setting.
    """
    where = f"{source}/{ADAPTER_CONFIG}"
    if (bias := settings.get("bias", "none")) != "none":
        raise ValueError(f"{where}: bias is {bias!r}; only none is supported, trained biases are no LoRA.")
    used = {key: value for key, value in settings.items() if value and key not in _WITHOUT_EFFECT | besides}
    used.pop("bias", None)
    if used:
        listed = ", ".join(f"{key}: {value}" for key, value in sorted(used.items()))
        raise ValueError(f"{where}: {listed} - lightning_em.adapters.LoRA is plain B A, without it.")
    if (start := settings.get("init_lora_weights", True)) not in _HARMLESS_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which moves a part of the base's own weights into the adapter; "
            "convert it to an ordinary LoRA first (path_initial_model_for_weight_conversion of peft)."
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and math.isfinite(alpha)  # Python's json module accepts NaN
    if not isinstance(rank, int) or rank < 1 or not is_number:
        raise ValueError(
            f"{where}: expected r, a whole number from 1, and lora_alpha, a number, got {rank!r} and {alpha!r}."
        )
    placing = {key: settings[key] for key in _PLACING if settings.get(key) is not None}
    if not placing.get("target_modules"):
        raise ValueError(f"{where}: there is no target_modules.")
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft only divides by the rank
            use_rslora=bool(settings.get("use_rslora")),
            **placing,
        )
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{where}: peft does not take it: {error}") from error


def lora_of(
    lora: LoraConfig, tensors: dict[str, Tensor], config: PreTrainedConfig, source: str, base: str
) -> ForeignLoRA:
    """Convert a PEFT LoRA to `lightning_em.adapters.LoRA`.

    Args:
        lora: Settings from `lora_config`.
        tensors: Content of adapter_model.safetensors.
        config: Config of the base model that the adapter is used with.
        source: Name of the folder, for messages.
        base: Name of the base model, for messages.

    Raises:
        ValueError: If tensors are missing, unexpected or of another shape, or the LoRA changes modules that our class
            does not support.
    """
    model = skeleton(config)
    path = path_of_layers(model)
    sites = _sites(lora, model, source, base)
    by_layer: dict[int, set[str]] = {}
    for name in sites:
        match = re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(
                f"{source} changes {name}, which lies in no decoder layer of {base}; "
                "lightning_em.adapters.LoRA changes linear modules of decoder layers only: train the adapter again "
                f"without {name.rsplit('.', 1)[-1]} among its target_modules."
            )
        by_layer.setdefault(int(match[1]), set()).add(match[2])
    expected = {
        f"{PREFIX}{name}.{part}.weight": list(shape)
        for name, shapes in sites.items()
        for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True)
    }
    if tensors.keys() != expected.keys():
        # names of an older transformers, such as language_model.model for model.language_model; peft maps them too
        tensors = convert_peft_adapter_state_dict_for_transformers(model, lora, tensors)
    _refuse_other_tensors(expected, tensors, source, base)
    target_modules, layers = _placing(by_layer, set(sites), config, source)
    init_args = {
        "rank": lora.r,
        "alpha": float(lora.lora_alpha),
        "target_modules": target_modules,
        "layers": layers,
        "rslora": lora.use_rslora,
    }
    return ForeignLoRA(init_args, tensors)


def _placing(
    by_layer: Mapping[int, set[str]], sites: set[str], config: PreTrainedConfig, source: str
) -> tuple[list[str], list[int] | None]:
    """Return `target_modules` and `layers` with which our LoRA changes exactly the given modules.

    Raises:
        ValueError: If there are none, because one layer has other modules than another.
    """
    paths = {path for own in by_layer.values() for path in own}
    leaves, model = {path.rsplit(".", 1)[-1] for path in paths}, skeleton(config)
    for names in (leaves, paths):  # short names, unless they mean more modules
        for layers in (None, sorted(by_layer)):
            try:
                lora = LoRA(1, 1.0, sorted(names), None if layers is None else [*layers])
                reached = lora.target_names(model)
            except ValueError:
                continue
            if set(reached) == sites:
                return sorted(names), layers
    raise ValueError(
        f"{source} changes other modules in one layer than in another; lightning_em.adapters.LoRA changes the same "
        f"in each: {'; '.join(f'layer {k}: {sorted(v)}' for k, v in sorted(by_layer.items()))}."
    )


def _sites(
    lora: LoraConfig, model: nn.Module, source: str, base: str
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Modules that peft changes for these settings, with the shapes of A and B."""
    # Let peft itself match `target_modules`, which may be names, a regular expression or "all-linear".
    try:
        with warnings.catch_warnings():
            # peft sets fan_in_fan_out by the kind of a module, and warns if the settings say otherwise
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{source} does not fit {base}: {error}") from error
    sites = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            kind = type(module.get_base_layer()).__name__
            raise ValueError(
                f"{source} changes {name}, a {kind}; lightning_em.adapters.LoRA changes linear modules only."
            )
        a, b = (model.get_parameter(f"{name}.{part}.default.weight") for part in ("lora_A", "lora_B"))
        sites[name] = (a.shape, b.shape)
    return sites


def _refuse_other_tensors(
    expected: Mapping[str, list[int]], tensors: Mapping[str, Tensor], source: str, base: str
) -> None:
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name}: {list(tensors[name].shape)} instead of {expected[name]}"
        for name in sorted(expected.keys() & tensors.keys())
        if list(tensors[name].shape) != expected[name]
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{source}/{ADAPTER_WEIGHTS} is not what its {ADAPTER_CONFIG} describes on {base}. Missing: "
            f"{missing or 'none'}; unexpected: {unexpected or 'none'}; shapes: {shapes or 'all equal'}. "
            "Give --base the model it was trained on, or fetch the whole folder again."
        )


def factor_of(lora: LoraConfig) -> float:
    """Factor on B A: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
