"""Test bench for an adapter: binds it to a copy of a base model and records what it changes."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers, final_norm
from lightning_em.batch import PackedBatch
from lightning_em.models import AdaptedModel
from lightning_em.testing.law import require
from lightning_em.testing.samples import rows


class Event(NamedTuple):
    """Floating point tensors that went into, or came out of, a module of the base model."""

    place: str
    tensors: list[Tensor]


class Bench:
    """An adapter bound to a copy of the base model, with the parameters and outputs of the base model before that.

    Args:
        adapter: Adapter that is not attached yet.
        base: Base model; it is copied and not changed.
        dtype: Data type of the copy.
        seed: Seed of the rows and of the random parameters.
        trained: Whether to add random noise to the adapter's parameters, so that the update is not zero.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: PreTrainedModel,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        trained: bool = True,
    ) -> None:
        self.base = copy.deepcopy(base).to(dtype).eval()  # type: ignore[arg-type]
        self.names = [name for name, _ in self.base.named_modules()]
        self.frozen = {name: (p, p.detach().clone()) for name, p in self.base.named_parameters()}
        self.batch = rows(self.base, seed)
        self.plain_logits, self.plain_events = self.logits(), self.events()
        self.adapter = adapter
        self.model = AdaptedModel(self.base, adapter, seed)
        if trained:
            generator = torch.Generator().manual_seed(seed)
            for parameter in adapter.trainable().values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.data.add_(0.05 * noise.to(parameter))

    def _forward(self, batch: PackedBatch) -> Tensor:
        rows = batch.padded()
        output = self.base(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        logits: Tensor = output.logits[rows.attention_mask.bool()]
        return logits

    def grad_logits(self, scale: float = 1.0) -> Tensor:
        """Compute logits `[tokens, vocab]` with the base model's own forward pass on padded rows, with gradients."""
        with self.adapter.at_scale(scale):
            return self._forward(self.batch)

    @torch.no_grad()
    def logits(self, scale: float | None = None, batch: PackedBatch | None = None) -> Tensor:
        """Compute the same logits without gradients; if `scale` is None, the adapter's scale is not set."""
        batch = self.batch if batch is None else batch
        if scale is None:
            return self._forward(batch)
        with self.adapter.at_scale(scale):
            return self._forward(batch)

    def events(self, scale: float | None = None) -> list[Event]:
        """Record inputs and outputs of the base model's original modules, in order of execution.

        Inputs are recorded after the adapter's hooks, as the module receives them.
        """
        events: list[Event] = []
        with self._watch(events):
            self.logits(scale)
        return events

    @contextmanager
    def _watch(self, events: list[Event]) -> Iterator[None]:
        handles = []
        for name in self.names:
            module = self.base.get_submodule(name)
            entry, exit_ = (partial(look, events, name or "the model") for look in (_see_input, _see_output))
            handles.append(module.register_forward_pre_hook(entry, with_kwargs=True))
            handles.append(module.register_forward_hook(exit_))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def effect(self, *scales: float) -> tuple[str, list[Tensor], float]:
        """Measure the change from scale 0 at the first module input or output that the adapter changes.

        Later inputs and outputs change too, but through nonlinear layers, so their change does not scale linearly.

        Returns:
            The name of the input or output, its change at each scale, and the rounding error to expect.
        """
        nothing, full = self.events(0.0), self.events(1.0)
        for index, (event, other) in enumerate(zip(nothing, full, strict=True)):
            for part, (old, new) in enumerate(zip(event.tensors, other.tensors, strict=True)):
                if old.shape != new.shape or not torch.equal(old, new):
                    require(
                        old.shape == new.shape, f"{event.place} has another shape than without the adapter"
                    )
                    at = [self.events(scale)[index].tensors[part].double() for scale in scales]
                    rounding = (
                        8 * torch.finfo(old.dtype).eps * max(t.norm().item() for t in (*at, old.double()))
                    )
                    return event.place, [tensor - old.double() for tensor in at], rounding
        raise AssertionError("with random parameters nothing changes between scale 0 and scale 1")

    def change_at(self, site: str | int) -> tuple[Tensor, Tensor]:
        """Measure the change from scale 0 to 1 at a site.

        Args:
            site: Name of a module, or index of the decoder layer that the stream enters; see `LowRank`.

        Returns:
            The change of the module's output or of the stream, and the module's input at scale 0.
        """
        layers = decoder_layers(self.base)
        if isinstance(site, str):
            name, place = site, f"output of {site}"
        else:
            module = layers[site] if site < len(layers) else final_norm(self.base)
            name = next(name for name, each in self.base.named_modules() if each is module)
            place = f"input of {name}"
        require(name in self.names, f"update names the site {site}, which is not a module of the base")
        before, after = (
            {e.place: e.tensors[0].double() for e in self.events(s) if e.tensors} for s in (0.0, 1.0)
        )
        return after[place] - before[place], before[f"input of {name}"]

    @contextmanager
    def raw_input_of(self, layer: int, seen: list[Tensor]) -> Iterator[None]:
        """Collect in `seen` the residual stream that reaches a layer, before any hook on that layer edits it."""
        layers = decoder_layers(self.base)
        module = layers[layer] if layer < len(layers) else final_norm(self.base)

        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            # a copy, as later hooks may edit it in place; with gradients, callers read only `requires_grad`
            seen.append(hidden if hidden.requires_grad else hidden.clone())

        handle = module.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _see_input(events: list[Event], name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
    events.append(Event(f"input of {name}", _tensors((args, kwargs))))


def _see_output(events: list[Event], name: str, _: nn.Module, __: Any, output: Any) -> None:
    events.append(Event(f"output of {name}", _tensors(output)))


def _tensors(value: Any) -> list[Tensor]:
    """Copies of the floating point tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
