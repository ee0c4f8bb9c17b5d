"""The base cut in two at the adapter: below it nothing is differentiated, and nothing is computed twice.

Both halves are the decoder's own forward pass, called through the language model. The blocks of the other half are
replaced by stubs that return their input, so masks, rotary embeddings, layer types and scalings remain the model's
own code, and this works for every architecture whose decoder is a list of blocks and a final norm.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers, final_norm


class _Stub(nn.Module):
    """Replaces a decoder block: returns its input, or `hidden` if there is one."""

    block: nn.Module

    def __init__(self, block: nn.Module, hidden: Tensor | None = None) -> None:
        super().__init__()
        # Not a submodule: nn.Module would register it, and its hooks and parameters would be in the model twice.
        object.__setattr__(self, "block", block)
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # transformers 5.23 decoders read attributes of their blocks, such as `layer.layer_type` for the mask
            return getattr(self.block, name)


class SplitDecoder:
    """A causal language model that can be run below and above the adapter.

    Args:
        base: The model with the adapter attached.
        adapter: Its `lowest_layer` is the cut; at 0 no layer lies below it.

    Attributes:
        adapter_is_above: Whether the adapter is known to change nothing below the cut; `prefix` checks it once.
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
            below: What `prefix` returned for these inputs; None runs the whole decoder.

        Returns:
            `[len(keep) hidden]`.

        Raises:
            ValueError: If the adapter has written into `below`, which other passes share.
        """
        caught: list[Tensor] = []
        if below is not None:
            # Parts get views that torch.split made. A write into one of those makes torch raise an error of its own
            # that does not name the adapter; after detach the version counter below sees it instead.
            below = below.detach()
        before = _version(below)

        # The final norm acts on each position alone, so positions that do not count are dropped before it.
        def select(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            return (flat if keep is None else flat[keep])[None]

        def catch(_: nn.Module, __: Any, output: Tensor) -> None:
            caught.append(output)

        # Registered now, so after the adapter's own hook on the norm, which must see every position: a vector on the
        # stream that leaves the last layer edits the input of the norm.
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
        """Replace the blocks below the cut by stubs, the last of which returns `below`."""
        if below is None:
            yield
            return
        with self._stubs(range(self.cut), below):
            yield

    def _run_below(self, inputs: dict[str, Any]) -> Tensor:
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            # no position is left for the norm and the head
            return hidden[:, :0]

        # First, before the adapter's own hook on the norm: the cut may be between the last layer and the norm.
        with self._stubs(range(self.cut, len(self.layers))), _before(self.norm, catch, first=True):
            self._call(inputs)
        return caught[0]

    def _check_adapter(self, inputs: dict[str, Any]) -> None:
        """Run the lower half once with autograd on: if its output needs a gradient, the adapter acts below the cut."""
        own = self.adapter.trainable().values()
        # Scale 1, because at scale 0 an adapter may skip its computation. Inputs made in inference mode cannot be
        # saved for a backward pass, hence the clones.
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
        # An empty index: the head computes no logits; FrozenHead does, in chunks. (transformers reads an int 0 as
        # "all positions".)
        nothing = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        self.base(**inputs, use_cache=False, logits_to_keep=nothing)

    @contextmanager
    def _stubs(self, indices: range, below: Tensor | None = None) -> Iterator[None]:
        # The module dict itself is edited: assigning to the ModuleList would run torch's registration of a submodule
        # and that of every wrapper around it.
        slots, blocks = self.layers._modules, {str(index): self.layers[index] for index in indices}
        try:
            for name, block in blocks.items():
                slots[name] = _Stub(block, below if int(name) == indices[-1] else None)
            yield
        finally:
            slots.update(blocks)


@contextmanager
def _wanted(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to all parameters inside the block, also to frozen ones."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _version(tensor: Tensor | None) -> int:
    """A number that every write in place increases, also one through a view; inference tensors have none."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def _before(module: nn.Module, edit: Callable[[Tensor], Tensor], first: bool = False) -> Iterator[None]:
    """Edit the input of a module, after its other hooks or before them (`first`)."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    with module.register_forward_pre_hook(hook, prepend=first):
        yield


@contextmanager
def _after(module: nn.Module, look: Callable[[nn.Module, Any, Tensor], None]) -> Iterator[None]:
    """Look at the output of a module."""
    with module.register_forward_hook(look):
        yield
