"""One training step of cross-entropy plus KL, in common implementations and in this project's."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from peft import BeftConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import LORA_ALPHA, LORA_RANK, Shape, lora_sites, make_adapter
from lightning_em.batch import PackedBatch
from lightning_em.losses import LossWeights
from lightning_em.models import AdaptedModel, StepLoss

KL_WEIGHT = 1.0


class Peer(ABC):
    """An implementation of the loss of a step and its gradient.

    Attributes:
        parameters: Trainable parameters.
    """

    parameters: list[Tensor]

    @abstractmethod
    def loss(self, ce: PackedBatch, kl: PackedBatch) -> Tensor:
        """CE + KL in nats per counted token, with its autograd graph."""

    def prepare(self, ce: PackedBatch, kl: PackedBatch) -> None:  # noqa: B027
        """Do the work that the implementation does once per data set."""

    def step(self, ce: PackedBatch, kl: PackedBatch) -> tuple[float, Tensor]:
        """Compute the loss and its gradient, flattened to one vector."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss(ce, kl)
        # Not autograd.grad: it would skip the backward pass through the frozen layers, which a trainer with TRL's
        # default (inputs that require a gradient) has to make.
        torch.autograd.backward(loss)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])


class Naive(Peer):
    """transformers + peft: padded batches, full logits, `disable_adapter()` for the reference.

    The steering vector is peft's BEFT: a bias on the output of the last linear module of a layer.

    Args:
        shape: Shape of the model.
        kind: Kind of the adapter.
        device: Device to run on.
        checkpointing: Whether to checkpoint every layer with `enable_input_require_grads`, the default of TRL.
        second_model: Whether to keep a second copy of the weights as the reference.
        cached_logits: Whether to compute all reference logits only once.
    """

    def __init__(
        self,
        shape: Shape,
        kind: str,
        device: torch.device,
        checkpointing: bool = False,
        second_model: bool = False,
        cached_logits: bool = False,
    ) -> None:
        self.model = get_peft_model(shape.base(device), _peft_config(shape, kind))
        assert isinstance(self.model, PeftModel)
        if checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
            self.model.train()  # checkpointing is silently inactive in eval mode; no dropout is configured
        self.reference = shape.make(device) if second_model else None
        self.cached_logits = cached_logits
        self._logits: dict[tuple[str, ...], Tensor] = {}
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for _, parameter in named:
            parameter.data = parameter.data.float()
        self.parameters = [parameter for _, parameter in named]
        _randomise(dict(named), shape, kind)

    def loss(self, ce: PackedBatch, kl: PackedBatch) -> Tensor:
        logits = self._forward(ce)
        labels = torch.where(ce.response_mask, ce.input_ids, -100)
        padded = torch.nn.utils.rnn.pad_sequence(
            list(torch.split(labels, list(ce.lengths))), batch_first=True, padding_value=-100
        )
        cross_entropy = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), padded[:, 1:].flatten()
        )
        tuned = functional.log_softmax(self._forward(kl).float(), dim=-1)
        reference = functional.log_softmax(self._reference_logits(kl).float(), dim=-1)
        per_token = functional.kl_div(tuned, reference, log_target=True, reduction="none").sum(-1)
        counted = torch.split(kl.counted("response"), list(kl.lengths))
        mask = torch.nn.utils.rnn.pad_sequence(list(counted), batch_first=True)
        return cross_entropy + KL_WEIGHT * (per_token * mask).sum() / mask.sum()

    def prepare(self, ce: PackedBatch, kl: PackedBatch) -> None:
        if self.cached_logits:
            self._logits[kl.row_ids] = self._live_reference(kl)

    def _forward(self, batch: PackedBatch, model: Any = None) -> Tensor:
        rows = batch.padded()
        run = self.model if model is None else model
        logits: Tensor = run(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        return logits

    def _reference_logits(self, batch: PackedBatch) -> Tensor:
        return self._logits[batch.row_ids] if self.cached_logits else self._live_reference(batch)

    @torch.no_grad()
    def _live_reference(self, batch: PackedBatch) -> Tensor:
        off: AbstractContextManager[Any] = nullcontext() if self.reference else self.model.disable_adapter()
        with off:
            return self._forward(batch, self.reference)


class Ours(Peer):
    """This project's implementation.

    Args:
        shape: Shape of the model.
        kind: Kind of the adapter.
        device: Device to run on.
        make_store: Function that makes an activation store; no store if not given.
        reference: `live` or `cached`; used only with a store.
        refilled: Whether to start each step with an empty store, as in the first epoch.
        backend: Backend of the model.
        dtype: Dtype of weights and adapter; that of the shape if not given.
    """

    def __init__(
        self,
        shape: Shape,
        kind: str,
        device: torch.device,
        make_store: Callable[[], Any] | None = None,
        reference: str = "live",
        refilled: bool = False,
        backend: Literal["auto", "plain"] = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.make_store, self.refilled = make_store, refilled
        options: dict[str, Any] = {"store": make_store(), "reference": reference} if make_store else {}
        # a conversion must not reach the weights that other peers share
        base = shape.base(device) if dtype is None else shape.make(device)
        self.model = AdaptedModel(base, make_adapter(kind, shape), backend=backend, **options)
        self.model.to(device, dtype)
        self.parameters = list(self.model.adapter.trainable().values())
        _randomise(self.model.adapter.trainable(), shape, kind)

    def loss(self, ce: PackedBatch, kl: PackedBatch) -> Tensor:
        return self.step_loss(ce, kl).total

    def step_loss(self, ce: PackedBatch, kl: PackedBatch) -> StepLoss:
        """Compute `loss`, and CE and KL as sums."""
        if self.refilled and self.make_store and (cache := self.model.backend.hidden.cache) is not None:
            cache.store = self.make_store()
        counts = [int(batch.counted("response").sum()) for batch in (ce, kl)]
        return self.model.step_loss(ce, kl, LossWeights(1 / counts[0], KL_WEIGHT / counts[1]))


def _peft_config(shape: Shape, kind: str) -> Any:
    if kind == "vector":
        return BeftConfig(target_modules=rf".*\.layers\.{shape.layer - 1}\.mlp\.down_proj")
    layers, modules = ("|".join(map(str, names)) for names in lora_sites(kind, shape))
    return LoraConfig(
        r=LORA_RANK, lora_alpha=int(LORA_ALPHA), target_modules=rf".*\.layers\.({layers})\..*({modules})"
    )


def _randomise(parameters: dict[str, Any], shape: Shape, kind: str) -> None:
    """Give every implementation the same small update. All list their parameters in the order of the layers."""
    std = shape.vector_std if kind == "vector" else 0.05
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.numel(), generator=generator).view(parameter.shape)
            parameter.copy_(std * noise)
