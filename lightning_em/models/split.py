"""The frozen base cut in two at the adapter: below it nothing is differentiated, nor computed twice.

Both halves are the decoder's own forward pass, entered through the language model. The blocks of the other
half are swapped for stubs that hand the hidden states on, so masks, rotary embeddings, layer types and
scalings stay the model's own business.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers, final_norm
from lightning_em.losses.frozen_head import FrozenHead

FAST_ARCHITECTURES = (
    *("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text"),
    *("phi3", "olmo2", "granite", "smollm3", "gpt_neox"),
)
"""Model types whose halves are tested to equal the whole to the bit, and packed rows to equal padded ones."""


class _Stub(nn.Module):
    """Stands in for a decoder block: hands its input on, or `hidden` if it was given one."""

    block: nn.Module

    def __init__(self, block: nn.Module, hidden: Tensor | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: hooks and parameters stay out of sight
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)  # some decoders read `layer.layer_type`


class SplitDecoder:
    """A causal language model that can be run below and above the adapter.

    Args:
        base: The model with the adapter attached.
        adapter: Its `lowest_layer` is the cut; 0 leaves nothing below it.

    Attributes:
        adapter_is_above: Whether it is known that the adapter changes nothing below the cut; `prefix` looks.
    """

    def __init__(self, base: PreTrainedModel, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.layers, self.norm = decoder_layers(base), final_norm(base)
        self.cut = adapter.lowest_layer
        self.adapter_is_above = self.cut == 0

    @property
    def place(self) -> tuple[int, int]:
        """The cut, and the number of layers."""
        return self.cut, len(self.layers)

    @torch.no_grad()
    def prefix(self, inputs: dict[str, Any]) -> Tensor:
        """Hidden states that enter layer `cut`, `[batch seq hidden]`, with the adapter off.

        Args:
            inputs: Keyword arguments of the language model.

        Raises:
            ValueError: If the adapter changes anything below the cut.
        """
        if not self.adapter_is_above:
            self._check_adapter(inputs)
        with self.adapter.at_scale(0.0):
            return self._run_below(inputs)

    def final_hidden(
        self, inputs: dict[str, Any], keep: Tensor | None = None, below: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, at the positions that count.

        Args:
            inputs: Keyword arguments of the language model.
            keep: Indices into the flattened `[batch * seq]` positions; all of them if not given.
            below: What `prefix` gave for these inputs; None runs the whole decoder.

        Returns:
            `[len(keep) hidden]`.

        Raises:
            ValueError: If the adapter has written into `below`, which other passes share.
        """
        caught: list[Tensor] = []
        if below is not None:
            # or torch's own word on a view that is written to would come first, and name no adapter
            below = below.detach()
        before = _version(below)

        def select(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            return (flat if keep is None else flat[keep])[None]

        def catch(_: nn.Module, __: Any, output: Tensor) -> None:
            caught.append(output)

        # after the adapter's own hook on the norm
        with self.handed_in(below), _before(self.norm, select), _after(self.norm, catch):
            self._call(inputs)
        if _version(below) != before:
            name = type(self.adapter).__name__
            raise ValueError(
                f"{name} writes into the hidden states that its edit is given, which other passes read too: return "
                f"a new tensor from the edit, as in `hidden + update`, not `hidden += update`."
            )
        return caught[0][0]

    @contextmanager
    def handed_in(self, below: Tensor | None) -> Iterator[None]:
        """Swap the blocks below the cut for stubs, the last of which hands in `below`."""
        if below is None:
            yield
            return
        with self._stubs(range(self.cut), below):
            yield

    def _run_below(self, inputs: dict[str, Any]) -> Tensor:
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden[:, :0]

        # before the adapter's own hook on the norm: there the cut may be
        with self._stubs(range(self.cut, len(self.layers))), _before(self.norm, catch, first=True):
            self._call(inputs)
        return caught[0]

    def _check_adapter(self, inputs: dict[str, Any]) -> None:
        """Run the lower half once with gradients on: no parameter of the adapter must be seen, frozen or not."""
        own = self.adapter.trainable().values()
        with torch.inference_mode(False), torch.enable_grad(), self.adapter.at_scale(1.0), _wanted(own):
            copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
            seen = self._run_below(copies).requires_grad
        if seen:
            name = type(self.adapter).__name__
            raise ValueError(
                f"{name} changes the model below layer {self.cut}, its lowest_layer; set lowest_layer in "
                f"{name}.attach to the first layer whose computation it changes."
            )
        self.adapter_is_above = True

    def _call(self, inputs: dict[str, Any]) -> None:
        # no position for the head: its logits are not wanted, whoever asks goes through FrozenHead
        nothing = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        self.base(**inputs, use_cache=False, logits_to_keep=nothing)

    @contextmanager
    def _stubs(self, indices: range, below: Tensor | None = None) -> Iterator[None]:
        # the dict itself is edited: assigning to the list would run the registration of every wrapper
        slots, blocks = self.layers._modules, {str(index): self.layers[index] for index in indices}
        try:
            for name, block in blocks.items():
                slots[name] = _Stub(block, below if int(name) == indices[-1] else None)
            yield
        finally:
            slots.update(blocks)


@contextmanager
def _wanted(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to the parameters, for a while, whoever has frozen some."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _version(tensor: Tensor | None) -> int:
    """Goes up with each write in place, also through a view."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def _before(module: nn.Module, edit: Callable[[Tensor], Tensor], first: bool = False) -> Iterator[None]:
    """Edit the input of a module, before or after its other hooks."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    with module.register_forward_pre_hook(hook, prepend=first):
        yield


@contextmanager
def _after(module: nn.Module, look: Callable[[nn.Module, Any, Tensor], None]) -> Iterator[None]:
    """Look at the output of a module."""
    with module.register_forward_hook(look):
        yield


def frozen_head(base: PreTrainedModel) -> FrozenHead:
    """The output head of a supported model with what its config does to the logits.

    Raises:
        ValueError: If the head is not a plain linear module, or somebody hooks into it.
    """
    head: Any = base.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        raise ValueError("the output head is not a plain linear module")
    config = base.config.get_text_config(decoder=True)
    bias: Tensor | None = head.bias
    scaling: float = getattr(config, "logits_scaling", None) or 1.0
    return FrozenHead(
        weight=_whole(head.weight.detach()),
        bias=None if bias is None else _whole(bias.detach()),
        logit_scale=1.0 / scaling,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _whole(weight: Tensor) -> Tensor:
    """A sharded (FSDP2) weight gathered; a plain one as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()
