"""What every adapter is: an update of the frozen model with one knob, its scale."""

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
"""A decoder layer by index, or as a fraction of depth: f means layer floor(f x number of layers)."""


def decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model.

    Raises:
        ValueError: If the architecture has no list of as many blocks as its config names.
    """
    num_layers = base.config.get_text_config(decoder=True).num_hidden_layers
    for module in base.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"{type(base).__name__} has no list of {num_layers} decoder layers; choose another model.base.path."
    )


def final_norm(base: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder block and the head.

    Raises:
        ValueError: If none is found under a name known to transformers.
    """
    decoder = base.get_decoder()
    for name in ("norm", "final_layer_norm", "final_layernorm", "ln_f"):
        if hasattr(decoder, name):
            return getattr(decoder, name)  # type: ignore[no-any-return]
    raise ValueError(f"{type(base).__name__} has no final norm that is known here; use an earlier layer.")


class Adapter(nn.Module, ABC):
    """A trainable update of a frozen causal language model.

    The update is applied `scale` times: 1 trains, 0 is the reference model to the bit, s is the
    scale probe. Parameters are float32 whatever the base's dtype and start at no update.
    A subclass implements `attach` and, where the update has low-rank parts, `update`: its norm, distances,
    trajectories, cosines and exports are computed from them. `lightning_em.testing.check_adapter` checks the
    contract.

    Attributes:
        init_args: Arguments of the class, defaults included; `adapter_config.json` keeps them.
        lowest_layer: The first decoder layer whose computation the adapter changes; set by `attach`.
        generator: Source of random initial values, on CPU; set before `attach` is called.
    """

    init_args: dict[str, Any]
    generator: torch.Generator
    _base: PreTrainedModel

    def __new__(cls: type[Own], *args: Any, **kwargs: Any) -> Own:
        """Note the arguments, so that a subclass need not repeat them for its checkpoint."""
        adapter = super().__new__(cls)
        # object's: nn.Module.__setattr__ works after nn.Module.__init__ only
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
        """Factor on the update: 1 trains, 0 is the reference."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = scale
        self.on_scale(scale)

    def on_scale(self, scale: float) -> None:  # hooks read `scale` themselves
        """Pass the new scale on, for an adapter whose update is applied by somebody else's code."""

    @abstractmethod
    def attach(self, base: PreTrainedModel) -> None:
        """Create the parameters for `base` and hook into it. `base` itself stays frozen."""

    def update(self) -> list[LowRank] | None:
        """The parts of the update, in the adapter's parameters; None if it has no such form.

        Without them an adapter is trained, scaled, perturbed and saved like any other, but has no displacement,
        rotation, trajectory, cosine, write direction or export, and says so.
        """
        return None

    def effective_norm(self) -> Tensor | None:
        """Norm of the update at scale 1; None for an adapter without a natural one (norm probes skip it).

        Frobenius norm over the parts of `update`; an adapter without parts may have a norm of its own.
        """
        parts = self.update()
        return None if parts is None else update_norm(parts, self.trainable())

    def write_directions(self) -> dict[str, Tensor] | None:
        """What the update adds to the residual stream, as one vector `[hidden]` a site; None if it is no such thing.

        The length is the size of the update at scale 1; a site whose update is zero has none.
        """
        parts = self.update()
        return None if parts is None else write_directions(parts, self.trainable())

    def resolve(self, base: PreTrainedModel, layer: LayerIndex) -> int:
        """Index of a layer given as index or fraction of depth; sets `lowest_layer` to the lowest so far.

        Raises:
            ValueError: If the layer does not exist.
        """
        num_layers = len(decoder_layers(base))
        # 1e-9: .58 of 50 layers is layer 29, though .58 * 50 is a little less in binary
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
        """Pass the residual stream that enters a decoder layer through `edit`, every row and position.

        `lowest_layer` becomes the lowest layer edited so far.

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
        """Pass the residual stream that leaves a decoder layer through `edit`: it enters the next one."""
        self.edit_input_of(layer + 1, edit)

    def bind(self, base: PreTrainedModel, seed: int) -> None:
        """Attach to `base` and check what came of it; called once, by `AdaptedModel`.

        Args:
            base: The model; frozen here.
            seed: Of the random initial values.

        Raises:
            ValueError: If the adapter is bound already, or `attach` broke the contract.
        """
        if self.lowest_layer >= 0:
            name = type(self).__name__
            raise ValueError(f"this {name} is attached already; make a new one for another model.")
        object.__setattr__(self, "_base", base)  # not a submodule: the base is not ours to save
        self.generator = torch.Generator().manual_seed(seed)
        base.requires_grad_(False)
        base.disable_input_require_grads()  # on with checkpointing: the backward would run through every layer
        # Where the generator draws. Lightning asks for a GPU at this time.
        with torch.device("cpu"):
            self.attach(base)
        self.to(base.device)
        base.eval()  # modules that `attach` put in are born in training mode
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
        """Refuse, before training, what the first checkpoint could not say."""
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
        """The adapter's parameters under the names they are saved with."""
        return dict(self.named_parameters())

    @contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """Apply the update `scale` times inside the block."""
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before

    @contextmanager
    def perturbed(self, strength: float, generator: torch.Generator) -> Iterator[None]:
        """Rotate each parameter tensor towards a random orthogonal direction of equal norm inside the block.

        x' = sqrt(1 - e^2) x + e y with x.y = 0 and ||y|| = ||x||, per flattened tensor. A strength of 0
        changes no bit; a tensor of one number has no orthogonal direction and stays as it is.

        Args:
            strength: e, between 0 and 1.
            generator: Source of y, on CPU; the draws do not depend on the strength.

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
        """What `adapter_config.json` says beside the weights."""
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
        """A new adapter of the class and arguments that a checkpoint names; attach it, then `load` the folder.

        The class must have been imported: a checkpoint makes nothing run.

        Args:
            checkpoint: A checkpoint folder, or one that `save` wrote.

        Raises:
            ValueError: If the class is not imported, or the folder names none.
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
        """Read weights written by `save`.

        Raises:
            ValueError: If names or shapes differ; both sides are listed.
        """
        self.load_tensors(load_file(folder / ADAPTER_WEIGHTS), source=str(folder))

    def load_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy tensors into the parameters of the same names.

        Args:
            tensors: One tensor for each name of `trainable()`.
            source: Where they come from, for the message.

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
    """Arguments of a call by name, with defaults; empty if they do not fit, which `__init__` is about to say."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    try:
        # partial: copy.deepcopy calls __new__ without arguments and restores the original's afterwards
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
    """JSON-ready copy of settings: enums by value, sets sorted, paths as text."""
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
    """The path a config names the class by: its package's, if that exports it."""
    package = kind.__module__.rpartition(".")[0]
    exported = getattr(sys.modules.get(package), kind.__qualname__, None) is kind
    return f"{package if exported else kind.__module__}.{kind.__qualname__}"


def orthogonal_noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random tensor orthogonal to `tensor`, of the same shape and norm (float64 inside).

    Zero where there is no such direction: for a zero tensor, and for one number alone.
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
