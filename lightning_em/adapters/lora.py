"""LoRA through peft, any rank and placement; saved as an ordinary PEFT folder."""

import math
from enum import Enum
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters.base import Adapter, LayerIndex, decoder_layers

_PEFT_PREFIX, _PEFT_ADAPTER = "base_model.model.", "default"
# Modules of a decoder layer whose output is added to the residual stream.
_WRITERS = frozenset({"o_proj", "down_proj"})


class LoRA(Adapter):
    """Low-rank change of weight matrices: W + scale x (alpha / rank) B A.

    Args:
        rank: Inner dimension.
        alpha: Strength; the change is alpha / rank, or alpha / sqrt(rank) with `rslora`, times B A.
        target_modules: Names of linear modules inside a decoder layer, e.g. `[down_proj]`.
        layers: Indices or fractions of depth; every layer if not given.
        rslora: Rank-stabilised scaling.

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
        with torch.random.fork_rng(devices=[]):  # peft draws values of its own, replaced below
            inject_adapter_in_model(config, base, _PEFT_ADAPTER)
        self._peft_config = config
        self._sites = {name: base.get_submodule(name) for name in names}
        for lora_a, lora_b in self._matrices():
            lora_a.data, lora_b.data = lora_a.data.float(), torch.zeros_like(lora_b.data, dtype=torch.float32)
            bound = 1 / math.sqrt(lora_a.shape[1])  # peft's own default, from a named generator
            values = torch.empty(lora_a.shape).uniform_(-bound, bound, generator=self.generator)
            lora_a.data.copy_(values)

    def _target_names(self, base: PreTrainedModel) -> list[str]:
        """Full names of the modules to change; sets `lowest_layer` to the lowest of them."""
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
        """A and B of each changed module."""
        weights = f"{_PEFT_ADAPTER}.weight"
        return [
            (site.get_parameter(f"lora_A.{weights}"), site.get_parameter(f"lora_B.{weights}"))
            for site in self._sites.values()
        ]

    def effective_norm(self) -> Tensor:
        """Frobenius norm of the weight change, root of the sum of squares over modules."""
        factor = self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
        squares = []
        for lora_a, lora_b in self._matrices():
            a, b = lora_a.detach().double(), lora_b.detach().double()
            squares.append(((b.T @ b) * (a @ a.T)).sum())  # ||BA||^2 without forming BA
        return abs(factor) * torch.stack(squares).sum().clamp_min(0).sqrt().float()

    def write_directions(self) -> dict[str, Tensor] | None:
        """Top left singular vector of each weight change, times its singular value.

        For rank 1 it points along the column of B. For higher ranks its sign is a convention (the largest
        entry is positive): the update writes it with either sign, as the input says.
        Only `o_proj` and `down_proj`, which write into the residual stream (in Gemma-2 and -3 through a norm that
        is left out here); None if neither is changed.
        """
        factor = abs(self.alpha) / (math.sqrt(self.rank) if self.rslora else self.rank)
        directions, writes = {}, False
        for name, (lora_a, lora_b) in zip(self._sites, self._matrices(), strict=True):
            if name.rsplit(".", 1)[-1] not in _WRITERS:
                continue
            writes = True
            direction = factor * _top_left(lora_a.detach().double(), lora_b.detach().double())
            if direction.any():
                directions[name] = direction.float()
        return directions if writes else None

    def config_dict(self) -> dict[str, Any]:
        """The PEFT config, so that plain `PeftModel.from_pretrained` loads the folder."""
        return {**_plain(self._peft_config.to_dict()), "inference_mode": True}


def _top_left(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Top left singular vector of B A times its singular value, without forming B A."""
    basis, triangle_b = torch.linalg.qr(lora_b)
    triangle_a = torch.linalg.qr(lora_a.T).R
    left, values, _ = torch.linalg.svd(triangle_b @ triangle_a.T)
    direction: Tensor = values[0] * (basis @ left[:, 0])
    pointer = lora_b[:, 0] @ direction if lora_b.shape[1] == 1 else direction[direction.abs().argmax()]
    return direction if pointer >= 0 else -direction


def _plain(value: Any) -> Any:
    """JSON-ready copy of a PEFT config: enums by value, sets sorted."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
