"""The decoder split at the adapter's lowest layer: the lower half runs once and without autograd.

Each half is a forward pass of the whole language model in which stubs replace the blocks of the other half. A stub
returns its input unchanged. Masks, rotary embeddings, layer types and scalings therefore remain the model's own code,
and the split works for every architecture whose decoder is a list of blocks and a final norm.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, decoder_layers, final_norm


class _Stub(nn.Module):
    """Stands in for a decoder block and returns its input, or `hidden` if given."""

    block: nn.Module

    def __init__(self, block: nn.Module, hidden: Tensor | None = None) -> None:
        super().__init__()
        # Assigned with object.__setattr__, so that nn.Module does not register the block as a submodule.
        object.__setattr__(self, "block", block)
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.hidden is None else self.hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # transformers 5.23 decoders read attributes of their blocks, such as `layer.layer_type` for the mask;
            # the stub forwards them to the block it replaces
            return getattr(self.block, name)


class SplitDecoder:
    """A causal language model whose layers below and above the adapter can run separately.

    Args:
        base: The base model with the adapter attached.
        adapter: The adapter. The model is cut at its `lowest_layer`; at 0 no layer lies below the cut.

    Attributes:
        adapter_is_above: Whether the adapter is known to change nothing below the cut. The first call of `prefix`
            checks this.
    """

    def __init__(self, base: PreTrainedModel, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.layers, self.norm = decoder_layers(base), final_norm(base)
        self.cut = adapter.lowest_layer
        self.adapter_is_above = self.cut == 0

    @property
    def place(self) -> tuple[int, int]:
        """Index of the layer at the cut, and the number of layers."""
        return self.cut, len(self.layers)

    @torch.no_grad()
    def prefix(self, inputs: dict[str, Any]) -> Tensor:
        """Compute the hidden states that enter layer `cut`, `[batch seq hidden]`, at scale 0.

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
        """Compute the hidden states after the final norm at the kept positions.

        Args:
            inputs: Keyword arguments of the language model.
            keep: Indices of the kept positions in the flattened `[batch * seq]` positions; all if not given.
            below: Result of `prefix` for these inputs; None runs the whole decoder.

        Returns:
            Hidden states `[len(keep) hidden]`.

        Raises:
            ValueError: If the adapter modified `below` in place; other passes share this tensor.
        """
        caught: list[Tensor] = []
        if below is not None:
            # `below` may be a view from torch.split. An in-place write to such a view raises an error in torch that
            # does not name the adapter. After detach, torch allows the write, and the version check below detects it.
            below = below.detach()
        before = _version(below)

        # The final norm acts on each position separately, so positions that are not kept are dropped before it.
        def select(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, 1)
            return (flat if keep is None else flat[keep])[None]

        def catch(_: nn.Module, __: Any, output: Tensor) -> None:
            caught.append(output)

        # Hooks run in the order of registration. An adapter that edits the output of the last layer has a hook on the
        # norm, registered earlier; it must see all positions, so `select` runs after it.
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
        """Replace the blocks below the cut by stubs; the last stub returns `below`."""
        if below is None:
            yield
            return
        with self._stubs(range(self.cut), below):
            yield

    def _run_below(self, inputs: dict[str, Any]) -> Tensor:
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            # pass an empty sequence on, so that the norm and the head compute nothing
            return hidden[:, :0]

        # `first=True`: if the cut is between the last layer and the norm, the adapter has its own hook on the norm, and
        # `catch` must run before it.
        with self._stubs(range(self.cut, len(self.layers))), _before(self.norm, catch, first=True):
            self._call(inputs)
        return caught[0]

    def _check_adapter(self, inputs: dict[str, Any]) -> None:
        """Check that the adapter changes nothing below the cut.

        The lower half runs once with autograd on. If its output requires a gradient, it depends on the adapter.

        Raises:
            ValueError: If the adapter acts below the cut.
        """
        own = self.adapter.trainable().values()
        # Scale 1, because an adapter may skip its computation at scale 0. Inputs created in inference mode cannot be
        # saved for a backward pass, so they are cloned.
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
        # An empty index tensor makes the model's head compute no logits; FrozenHead computes them in chunks.
        # (transformers interprets the integer 0 as "all positions".)
        nothing = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        self.base(**inputs, use_cache=False, logits_to_keep=nothing)

    @contextmanager
    def _stubs(self, indices: range, below: Tensor | None = None) -> Iterator[None]:
        # Edit the module dict directly: assigning to the ModuleList would run torch's registration of a submodule, and
        # that of every wrapper around it.
        slots, blocks = self.layers._modules, {str(index): self.layers[index] for index in indices}
        try:
            for name, block in blocks.items():
                slots[name] = _Stub(block, below if int(name) == indices[-1] else None)
            yield
        finally:
            slots.update(blocks)


@contextmanager
def _wanted(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Enable gradients for all parameters inside the block, including frozen ones."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _version(tensor: Tensor | None) -> int:
    """Return torch's version counter, which every in-place write increases, also through a view.

    Inference tensors have no counter; for them, and for None, the result is 0.
    """
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def _before(module: nn.Module, edit: Callable[[Tensor], Tensor], first: bool = False) -> Iterator[None]:
    """Edit the input of a module inside the block, after its other pre-hooks, or before them if `first`."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    with module.register_forward_pre_hook(hook, prepend=first):
        yield


@contextmanager
def _after(module: nn.Module, look: Callable[[nn.Module, Any, Tensor], None]) -> Iterator[None]:
    """Call `look` with the output of a module inside the block."""
    with module.register_forward_hook(look):
        yield
