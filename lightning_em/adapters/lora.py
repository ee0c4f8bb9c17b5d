"""LoRA by peft, with any rank and target layers; saved as a standard PEFT folder."""

import copy
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex, decoder_layers, plain

logger = logging.getLogger(__name__)

_PEFT_PREFIX, _PEFT_ADAPTER = "base_model.model.", "default"


class LoRA(Adapter):
    """Low-rank update of weight matrices: W + scale x (alpha / rank) B A.

    Args:
        rank: Inner dimension of B A.
        alpha: Numerator of the factor on B A, which is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        target_modules: Names of linear modules inside a decoder layer, e.g. `[down_proj]`, or ends of their paths, e.g.
            `[self_attn.o_proj]`. Conv1D modules, as in GPT-2, are linear too.
        layers: Indices or fractions of depth; all layers if not given.
        rslora: Whether to use rank-stabilized scaling.

    Source: arXiv:2106.09685; rsLoRA arXiv:2312.03732.
    """

    def __init__(
        self,
        rank: int,
        alpha: float,
        target_modules: list[str],
        layers: list[LayerIndex] | None = None,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}; set model.adapter.init_args.rank.")
        if not target_modules or layers == []:
            raise ValueError(
                f"LoRA needs a module and a layer, got target_modules {target_modules} and layers {layers}; "
                "set model.adapter.init_args."
            )
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.target_modules, self.layers = target_modules, layers

    def attach(self, base: PreTrainedModel) -> None:
        names = self.target_names(base)
        is_conv1d = {isinstance(base.get_submodule(name), Conv1D) for name in names}
        if len(is_conv1d) > 1:
            raise ValueError(
                f"target_modules {self._listed(self.target_modules)} are Linear and Conv1D modules of "
                f"{type(base).__name__}, which peft stores in opposite orders; set "
                "model.adapter.init_args.target_modules to modules of one kind."
            )
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft only divides by the rank
            use_rslora=self.rslora,
            target_modules=names,
            fan_in_fan_out=is_conv1d == {True},  # the weight of a Conv1D, as in GPT-2, is [in out]
        )
        config.base_model_name_or_path = base.name_or_path or None
        self._refuse_rewritten(config, base)
        with torch.random.fork_rng(devices=[]):  # peft draws initial values, which are replaced below
            inject_adapter_in_model(config, base, _PEFT_ADAPTER)
        self._peft_config = config
        self._sites = {name: base.get_submodule(name) for name in names}
        for lora_a, lora_b in self._matrices():
            lora_a.data, lora_b.data = lora_a.data.float(), torch.zeros_like(lora_b.data, dtype=torch.float32)
            bound = 1 / math.sqrt(lora_a.shape[1])  # peft's default initialization, drawn from our generator
            values = torch.empty(lora_a.shape).uniform_(-bound, bound, generator=self.generator)
            lora_a.data.copy_(values)
        logger.info("LoRA: %s", self.reached())

    def reached(self) -> str:
        """Describe which modules of which layers the LoRA changes, such as `mlp.down_proj of layers 0-3, 7`."""
        layers: dict[str, list[int]] = {}
        for site in self._sites:
            _, index, module = re.split(r"\.(\d+)\.", site, maxsplit=1)
            layers.setdefault(module, []).append(int(index))
        return "; ".join(f"{module} of {_layer_ranges(indices)}" for module, indices in layers.items())

    def target_names(self, base: PreTrainedModel) -> list[str]:
        """Return the full names of the target modules; set `lowest_layer` to the lowest layer with one.

        Raises:
            ValueError: If a name is in no layer, a given layer lacks one, or routed experts have it too.
        """
        blocks = decoder_layers(base)
        chosen = range(len(blocks)) if self.layers is None else [self.resolve(base, k) for k in self.layers]
        paths = {id(module): name for name, module in base.named_modules()}
        names, reached = [], {wanted: set[int]() for wanted in self.target_modules}
        for index in chosen:
            for name, module in blocks[index].named_modules():
                matching = [wanted for wanted in reached if f".{name}".endswith(f".{wanted}")]
                if matching and isinstance(module, nn.Linear | Conv1D):
                    names.append(f"{paths[id(blocks[index])]}.{name}")
                    for wanted in matching:
                        reached[wanted].add(index)
        self._refuse_experts(base, chosen)
        missing = {wanted: sorted(set(chosen) - layers) for wanted, layers in reached.items()}
        # In a hybrid model only some layers have attention; a LoRA on all layers is then one on those.
        if unreached := {
            w: k for w, k in missing.items() if k and (self.layers is not None or not reached[w])
        }:
            wanted, layers = next(iter(unreached.items()))
            has = self._listed({name for index in layers for name in _linear_names(blocks[index])})
            experts = self._listed({path for index in layers for path in _expert_parameters(blocks[index])})
            raise ValueError(
                f"target_modules {self._listed(unreached)} not found in {_layer_ranges(layers)} of "
                f"{type(base).__name__}, where the linear modules are {has or 'none'}"
                f"{f' (not reached are the stacked parameters {experts})' if experts else ''}"
                f"{_outside(base, wanted)}; set model.adapter.init_args.target_modules or layers."
            )
        self.lowest_layer = min(min(layers) for layers in reached.values())
        return names

    def _refuse_experts(self, base: PreTrainedModel, chosen: Sequence[int]) -> None:
        """Check that no layer has routed experts under the name of a target module.

        transformers 5 keeps the weights of all experts in one parameter, not in a linear module. A LoRA by module
        names would train the shared expert, or the layers without experts, in place of what the name means.
        """
        found: dict[str, set[int]] = {}
        for index in chosen:
            for path in _expert_parameters(decoder_layers(base)[index]):
                if any(_is_expert(wanted, path) for wanted in self.target_modules):
                    found.setdefault(path, set()).add(index)
        if found:
            where = "; ".join(f"{path} in {_layer_ranges(sorted(layers))}" for path, layers in found.items())
            raise ValueError(
                f"target_modules {self._listed(self.target_modules)} name routed experts of {type(base).__name__} "
                f"({where}), whose weights are one stacked parameter that lightning_em.adapters.LoRA does not reach. "
                "Set model.adapter.init_args.target_modules to linear modules that every token passes, such as those "
                "of the attention; a shared expert alone is named with its parent, as in shared_expert.down_proj."
            )

    def _refuse_rewritten(self, config: LoraConfig, base: PreTrainedModel) -> None:
        """Check that peft attaches to the given modules.

        For model types whose experts were linear modules in transformers 4, peft 0.21 reads the names of the experts'
        projections (and of the router) as stacked parameters, also in layers without experts and in shared experts.
        """
        seen = copy.deepcopy(config)
        try:
            convert_peft_config_for_transformers(seen, base, None)
            same = set(seen.target_modules or ()) == set(config.target_modules or ())
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"target_modules {self._listed(self.target_modules)} of {type(base).__name__} are names of its routed "
                "experts, and peft would attach to these in place of the linear modules of that name, which other "
                "layers or the shared expert have. Set model.adapter.init_args.target_modules to other modules, such "
                "as those of the attention."
            )

    @staticmethod
    def _listed(names: Iterable[str]) -> str:
        return ", ".join(sorted(names))

    def on_scale(self, scale: float) -> None:
        for site in self._sites.values():
            assert isinstance(site, LoraLayer)
            site.set_scale(_PEFT_ADAPTER, scale)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {
            f"{_PEFT_PREFIX}{name}.{part}.weight": matrix
            for name, matrices in zip(self._sites, self._matrices(), strict=True)
            for part, matrix in zip(("lora_A", "lora_B"), matrices, strict=True)
        }

    def _matrices(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return A and B of each target module."""
        weights = f"{_PEFT_ADAPTER}.weight"
        return [
            (site.get_parameter(f"lora_A.{weights}"), site.get_parameter(f"lora_B.{weights}"))
            for site in self._sites.values()
        ]

    def update(self) -> list[LowRank]:
        """Return one part for each module: (alpha / rank) B A, or (alpha / sqrt(rank)) B A with `rslora`."""
        factor = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        names = (f"{_PEFT_PREFIX}{site}" for site in self._sites)
        return [
            LowRank(site, f"{name}.lora_B.weight", f"{name}.lora_A.weight", factor)
            for site, name in zip(self._sites, names, strict=True)
        ]

    def config_dict(self) -> dict[str, Any]:
        """Return the PEFT config with our record inside, so that `PeftModel.from_pretrained` can load the folder.

        The record is stored under `auto_mapping`: peft 0.21 keeps this dict unchanged and reads it only if the config
        has no task_type. For unknown keys it would print a warning that recommends an upgrade.
        """
        config = plain(self._peft_config.to_dict())
        return {**config, "inference_mode": True, "auto_mapping": {"lightning_em": super().config_dict()}}


def _linear_names(block: nn.Module) -> set[str]:
    """Return the last names of the linear modules of a decoder layer."""
    return {n.rsplit(".", 1)[-1] for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _expert_parameters(block: nn.Module) -> Iterator[str]:
    """Yield the paths of parameters that stack the weights of several experts, `[experts out in]`."""
    for name, module in block.named_modules():
        # the weights of convolutions have three dimensions too
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        own = module.named_parameters(prefix=name, recurse=False)
        yield from (path for path, parameter in own if parameter.dim() == 3)


def _is_expert(wanted: str, path: str) -> bool:
    """Tell whether a target module means a stacked parameter, or a part of one such as `gate_up_proj`."""
    *parents, leaf = path.removesuffix(".weight").split(".")
    parts = {leaf, *(f"{part}_proj" for part in leaf.removesuffix("_proj").split("_") if "_proj" in leaf)}
    return any(f".{'.'.join((*parents, part))}".endswith(f".{wanted}") for part in parts)


def _outside(base: PreTrainedModel, wanted: str) -> str:
    """Say that a name is that of a module outside the decoder layers, such as `lm_head`."""
    linear = (n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Embedding))
    path = next((name for name in linear if f".{name}".endswith(f".{wanted}")), None)
    return "" if path is None else f" ({path} is outside the decoder layers, where LoRA changes nothing)"


def _layer_ranges(layers: Iterable[int]) -> str:
    """Describe layers as ranges, such as `layers 0-3, 7`."""
    ranges = []
    for _, run in groupby(enumerate(sorted(set(layers))), key=lambda pair: pair[1] - pair[0]):
        indices = [index for _, index in run]
        ranges.append(str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}")
    one = len(ranges) == 1 and ranges[0].isdecimal()
    return f"layer{'' if one else 's'} {', '.join(ranges)}"
