"""The base class of adapters: a trainable update of a frozen model, applied with an adjustable scale."""

import copy
import inspect
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapter_record import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterRecord, LowRank
from lightning_em.adapters.low_rank import update_norm, write_directions

Own = TypeVar("Own", bound="Adapter")
LayerIndex = int | float
"""A decoder layer as an index, or as a fraction f of depth, which means layer floor(f x number of layers)."""


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """Return the list of decoder blocks of a causal language model.

    Raises:
        ValueError: If the model has no module list whose length is the number of layers in its config.
    """
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"{type(base).__name__} has no list of {num_layers} decoder layers; choose another model.base.path."
    )


def final_norm(base: PreTrainedModel) -> nn.Module:
    """Return the norm between the last decoder block and the head.

    Raises:
        ValueError: If the decoder has no norm under one of the names that transformers uses.
    """
    decoder = base.get_decoder()
    for name in ("norm", "final_layer_norm", "final_layernorm", "ln_f"):
        if hasattr(decoder, name):
            return getattr(decoder, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(base).__name__} has no final norm that is known here; use an earlier layer.")


class Adapter(nn.Module, ABC):
    """A trainable update of a frozen causal language model.

    The update is multiplied by `scale`. Training uses scale 1. Scale 0 gives the reference model exactly, to the bit.
    The scale probe uses other values. Parameters are float32 for every dtype of the base model, and their initial
    values give a zero update.

    A subclass implements `attach`. If the update consists of low-rank parts, it also implements `update`, from which
    norms, distances, trajectories, cosines and exports are computed. `lightning_em.testing.check_adapter` checks the
    contract.

    Attributes:
        init_args: Arguments of the constructor, defaults included; saved in `adapter_config.json`.
        lowest_layer: First decoder layer whose computation the adapter changes; set by `attach`.
        generator: CPU generator for random initial values; set before `attach` is called.
    """

    init_args: dict[str, Any]
    generator: torch.Generator
    _base: PreTrainedModel

    def __new__(cls: type[Own], *args: Any, **kwargs: Any) -> Own:
        """Record the constructor arguments, so that subclasses need no code to save them in checkpoints."""
        adapter = super().__new__(cls)
        # object.__setattr__, because nn.Module.__setattr__ works only after nn.Module.__init__
        object.__setattr__(adapter, "init_args", _init_args(cls, args, kwargs))
        return adapter

    def __init__(self) -> None:
        super().__init__()
        self.lowest_layer: int = -1
        self._resolved: list[int] = []
        self._edited: list[int] = []
        self._scale = 1.0

    @property
    def scale(self) -> float:
        """Factor on the update: 1 in training, 0 for the reference."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = scale
        self.on_scale(scale)

    def on_scale(self, scale: float) -> None:  # hooks read `scale` themselves
        """Handle a change of the scale; override it if code of another library applies the update."""

    @abstractmethod
    def attach(self, base: PreTrainedModel) -> None:
        """Create the parameters for `base` and register hooks on it. The parameters of `base` stay frozen."""

    def update(self) -> list[LowRank] | None:
        """Return the low-rank parts of the update; None if the update has no such form.

        An adapter without parts can be trained, scaled, perturbed and saved like any other. Displacement, rotation,
        trajectory, cosine, write directions and export are not available for it, and report that.
        """
        return None

    def effective_norm(self) -> Tensor | None:
        """Return the norm of the update at scale 1; None if the adapter has no natural norm (norm probes skip it).

        The default is the Frobenius norm over the parts of `update`. An adapter without parts may define its own norm.
        """
        parts = self.update()
        return None if parts is None else update_norm(parts, self.trainable())

    def write_directions(self) -> dict[str, Tensor] | None:
        """Return the directions that the update adds to the residual stream, one vector `[hidden]` for each site.

        The norm of a vector is the size of the update at scale 1. A site with a zero update has no vector. The result
        is None if the update has no low-rank parts that write to the residual stream.
        """
        parts = self.update()
        return None if parts is None else write_directions(parts, self.trainable())

    def resolve(self, base: PreTrainedModel, layer: LayerIndex) -> int:
        """Convert an index or a fraction of depth to a layer index.

        Also sets `lowest_layer` to the lowest layer resolved so far.

        Raises:
            ValueError: If the layer does not exist.
        """
        num_layers = len(decoder_layers(base))
        # 1e-9, because 0.58 of 50 layers must be layer 29, but 0.58 * 50 is slightly less than 29 in floating point
        index = math.floor(layer * num_layers + 1e-9) if isinstance(layer, float) else layer
        if not 0 <= index < num_layers or (isinstance(layer, float) and layer < 0):
            key = "layer" if hasattr(self, "layer") else "layers"
            raise ValueError(
                f"layer must be 0..{num_layers - 1} or a fraction of depth in [0, 1), got {layer} "
                f"for a model of {num_layers} layers; set model.adapter.init_args.{key}."
            )
        self._resolved.append(index)
        self.lowest_layer = min(self._resolved)
        return index

    def edit_input_of(self, layer: int, edit: Callable[[Tensor], Tensor]) -> None:
        """Apply `edit` to the residual stream that enters a decoder layer, at every row and position.

        Also sets `lowest_layer` to the lowest layer edited so far.

        Args:
            layer: Index of the layer; the number of layers means the final norm.
            edit: Maps hidden states `[..., hidden]` to edited ones; not called at scale 0.
        """
        layers = decoder_layers(self._base)
        target = layers[layer] if layer < len(layers) else final_norm(self._base)
        self._edited.append(layer)
        self.lowest_layer = min(self._edited)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if self.scale == 0:
                return None
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

        target.register_forward_pre_hook(hook, with_kwargs=True)

    def edit_output_of(self, layer: int, edit: Callable[[Tensor], Tensor]) -> None:
        """Apply `edit` to the residual stream that leaves a decoder layer and enters the next one."""
        self.edit_input_of(layer + 1, edit)

    def bind(self, base: PreTrainedModel, seed: int) -> None:
        """Attach the adapter to `base` and validate the result; `AdaptedModel` calls this once.

        Args:
            base: The base model; this method freezes it.
            seed: Seed of the random initial values.

        Raises:
            ValueError: If the adapter is already bound, or `attach` violates the contract.
        """
        if self.lowest_layer >= 0:
            name = type(self).__name__
            raise ValueError(f"this {name} is bound to a model already; make a new one for another model.")
        object.__setattr__(self, "_base", base)  # not a submodule, so the base model is not saved
        self.generator = torch.Generator().manual_seed(seed)
        base.requires_grad_(False)
        base.disable_input_require_grads()  # gradient checkpointing turns it on; backward would run through every layer
        # The generator is on the CPU, so parameters are created there; Lightning sets a GPU as default device here.
        with torch.device("cpu"):
            self.attach(base)
        self.to(base.device)
        base.eval()  # modules that `attach` added are in training mode by default
        if self.lowest_layer < 0:
            raise ValueError(f"{type(self).__name__}.attach must set lowest_layer, or call resolve().")
        own = self.trainable()
        wrong = {n: p.dtype for n, p in own.items() if p.dtype != torch.float32 or not p.requires_grad}
        if wrong or not own:
            raise ValueError(
                f"{type(self).__name__}.attach must make trainable float32 parameters, got {wrong or 'none'}."
            )
        self._refuse_unwritable()

    def _refuse_unwritable(self) -> None:
        """Check before training that a checkpoint can describe the adapter.

        Raises:
            ValueError: If `init_args` cannot be written as JSON, or `update` names duplicate sites or unknown tensors.
        """
        name = type(self).__name__
        try:
            json.dumps(plain(self.init_args), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"adapter_config.json keeps plain values only, got init_args {self.init_args} of {name}: {error}."
            ) from None
        parts, known = self.update() or [], self.trainable()
        sites = [part.site for part in parts]
        named = {tensor for part in parts for tensor in (part.write, part.read) if tensor is not None}
        unknown = sorted(named - known.keys())
        if unknown or len(set(sites)) < len(sites):
            raise ValueError(
                f"{name}.update must name each site once, and tensors of trainable(); got sites {sites} and the "
                f"unknown tensors {unknown or 'none'}."
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by the names under which they are saved."""
        return dict(self.named_parameters())

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """Set the scale of the update inside the block."""
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before

    @contextmanager
    def perturbed(self, strength: float, generator: torch.Generator) -> Iterator[None]:
        """Rotate each parameter tensor towards a random orthogonal direction of equal norm inside the block.

        x' = sqrt(1 - e^2) x + e y with x.y = 0 and ||y|| = ||x||, for each flattened tensor. Strength 0 changes no bit.
        A tensor with one element has no orthogonal direction and is not changed.

        Args:
            strength: Noise strength e, between 0 and 1.
            generator: CPU generator for y; the draws do not depend on the strength.

        Raises:
            ValueError: If `strength` is not between 0 and 1.

        Source: arXiv:2602.07852 (stability).
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength}; set strengths of the probe.")
        originals = {name: parameter.detach().clone() for name, parameter in self.trainable().items()}
        try:
            with torch.no_grad():
                for name, parameter in self.trainable().items():
                    # draw even if the noise is not used, so that the draws do not depend on the strength
                    noise = orthogonal_noise(originals[name], generator)
                    if strength == 0 or parameter.numel() == 1:
                        continue
                    parameter.copy_((1 - strength**2) ** 0.5 * originals[name] + strength * noise)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.trainable().items():
                    parameter.copy_(originals[name])

    def config_dict(self) -> dict[str, Any]:
        """Return the content of `adapter_config.json`."""
        parts = self.update()
        record = AdapterRecord(
            class_path=_class_path(type(self)),
            init_args=plain(self.init_args),
            lowest_layer=self.lowest_layer,
            shapes={name: list(p.shape) for name, p in self.trainable().items()},
            update=None if parts is None else tuple(parts),
        )
        return asdict(record)

    @classmethod
    def from_checkpoint(cls, checkpoint: Path) -> "Adapter":
        """Create an unattached adapter from the class and arguments in a checkpoint.

        Attach it, then call `load` with the folder. The class must already be imported: reading a checkpoint never
        imports code.

        Args:
            checkpoint: A checkpoint folder, or a folder written by `save`.

        Raises:
            ValueError: If the class is not imported, or the folder does not name a class.
        """
        record = AdapterRecord.read(checkpoint)
        known = {_class_path(kind): kind for kind in _subclasses(Adapter)}  # type: ignore[type-abstract]
        if record.class_path not in known:
            raise ValueError(
                f"{checkpoint} holds a {record.class_path}, which is not imported; import it first."
            )
        return known[record.class_path](**record.init_args)

    def save(self, folder: Path) -> None:
        """Write weights and config into an existing folder."""
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trainable().items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(self.config_dict(), indent=2, sort_keys=True) + "\n"
        (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load weights written by `save`.

        Raises:
            ValueError: If names or shapes differ; the message lists the differences.
        """
        self.load_tensors(load_file(folder / ADAPTER_WEIGHTS), source=str(folder))

    def load_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy tensors into the parameters of the same names.

        Args:
            tensors: One tensor for each name of `trainable()`.
            source: Source of the tensors, for the message.

        Raises:
            ValueError: If names or shapes differ.
        """
        own = self.trainable()
        missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        shapes = [
            f"{name}: {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & tensors.keys())
            if tensors[name].shape != own[name].shape
        ]
        if missing or unexpected or shapes:
            raise ValueError(
                f"{source} does not hold this adapter. Missing: {missing or 'none'}; "
                f"unexpected: {unexpected or 'none'}; shapes: {shapes or 'all equal'}. "
                "Check model.adapter and model.base against the run that wrote it."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def _init_args(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor call by name, defaults included.

    The result is empty if the arguments do not match the signature; `__init__` then raises the error.
    """
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    try:
        # bind_partial, because copy.deepcopy calls __new__ without arguments and restores `init_args` afterwards
        bound = signature.bind_partial(None, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return copy.deepcopy(named)


def _subclasses(kind: type[Adapter]) -> Iterator[type[Adapter]]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def plain(value: Any) -> Any:
    """Return a copy of settings that JSON can represent: enums by value, sets sorted, paths as strings."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value.value if isinstance(value, Enum) else value


def _class_path(kind: type) -> str:
    """Return the class path for configs: the package's path if the package exports the class."""
    package = kind.__module__.rpartition(".")[0]
    exported = getattr(sys.modules.get(package), kind.__qualname__, None) is kind
    return f"{package if exported else kind.__module__}.{kind.__qualname__}"


def orthogonal_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor orthogonal to `tensor`, of the same shape and norm, computed in float64.

    The result is zero if no such direction exists: for a zero tensor and for a tensor with one element.
    """
    flat = tensor.detach().double().cpu().flatten()
    noise = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
    norm = flat.norm()
    if norm == 0 or flat.numel() == 1:
        return torch.zeros_like(tensor)
    unit = flat / norm
    noise -= (noise @ unit) * unit
    noise *= norm / noise.norm()
    return noise.view(tensor.shape).to(tensor)
