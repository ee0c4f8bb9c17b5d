"""LoRA by peft, with any rank and target layers; saved as a standard PEFT folder."""

import math
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lightning_em.adapter_record import LowRank
from lightning_em.adapters.base import Adapter, LayerIndex, decoder_layers, plain

_PEFT_PREFIX, _PEFT_ADAPTER = "base_model.model.", "default"


class LoRA(Adapter):
    """Low-rank update of weight matrices: W + scale x (alpha / rank) B A.

    Args:
        rank: Inner dimension of B A.
        alpha: Numerator of the factor on B A, which is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        target_modules: Names of linear modules inside a decoder layer, e.g. `[down_proj]`.
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
        names = self._target_names(base)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft only divides by the rank
            use_rslora=self.rslora,
            target_modules=names,
        )
        config.base_model_name_or_path = base.name_or_path or None
        with torch.random.fork_rng(devices=[]):  # peft draws initial values, which are replaced below
            inject_adapter_in_model(config, base, _PEFT_ADAPTER)
        self._peft_config = config
        self._sites = {name: base.get_submodule(name) for name in names}
        for lora_a, lora_b in self._matrices():
            lora_a.data, lora_b.data = lora_a.data.float(), torch.zeros_like(lora_b.data, dtype=torch.float32)
            bound = 1 / math.sqrt(lora_a.shape[1])  # peft's default initialization, drawn from our generator
            values = torch.empty(lora_a.shape).uniform_(-bound, bound, generator=self.generator)
            lora_a.data.copy_(values)

    def _target_names(self, base: PreTrainedModel) -> list[str]:
        """Return the full names of the target modules; set `lowest_layer` to the lowest chosen layer."""
        blocks = decoder_layers(base)
        chosen = range(len(blocks)) if self.layers is None else [self.resolve(base, k) for k in self.layers]
        wanted, names = set(self.target_modules), []
        paths = {id(module): name for name, module in base.named_modules()}
        for index in chosen:
            for name, module in blocks[index].named_modules():
                if name.rsplit(".", 1)[-1] in wanted and isinstance(module, nn.Linear):
                    names.append(f"{paths[id(blocks[index])]}.{name}")
        found = {name.rsplit(".", 1)[-1] for name in names}
        if found != wanted:
            linear = {n.rsplit(".", 1)[-1] for n, m in blocks[0].named_modules() if isinstance(m, nn.Linear)}
            raise ValueError(
                f"target_modules {sorted(wanted - found) or self.target_modules} not found in "
                f"{type(base).__name__}, whose layers have {sorted(linear)}; "
                "set model.adapter.init_args.target_modules."
            )
        self.lowest_layer = min(chosen)
        return names

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
