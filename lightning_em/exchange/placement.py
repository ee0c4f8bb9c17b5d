"""Find the linear module whose output shift equals a shift of the residual stream, by testing it on a small model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lightning_em.adapters import decoder_layers

# Last linear module of a block's MLP, by its names in transformers.
_MLP_OUTPUTS = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.fc2")
_SMALL_VOCABULARY, _SMALL_MLP = 64, 32
_CANNOT_BUILD = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a config on the meta device: names and shapes of its modules."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def path_of_layers(model: PreTrainedModel) -> str:
    """Return the path of the list of decoder layers in a model, e.g. `model.layers`."""
    layers = decoder_layers(model)
    path: str = next(name for name, module in model.named_modules() if module is layers)
    return path


def stream_site(config: PreTrainedConfig, layer: int) -> str:
    """Return the name of the linear module whose output shift equals a shift of the residual stream after a layer.

    In most architectures, adding to the MLP's output is adding to the residual stream, but not if a norm or a
    multiplier lies in between. A list of known architectures would become wrong when one of them changes. Instead,
    a small random model of the same class is run with and without a shift, and the streams are compared.

    Args:
        config: Config of the base model.
        layer: Index of the decoder layer.

    Raises:
        ValueError: If the architecture has no such module.
    """
    model = skeleton(config)
    block = f"{path_of_layers(model)}.{layer}"
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inner = next((name for name in _MLP_OUTPUTS if f"{block}.{name}" in linear), None)
    if inner is None:
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join(_MLP_OUTPUTS)} as a linear module in layer {layer}, so "
            "PEFT and the released format cannot represent the vector; use --format safetensors."
        )
    if not _shifts_the_stream(_small(config), inner):
        raise ValueError(
            f"in {type(model).__name__} something (a norm, or a multiplier) follows {inner} before its output joins "
            "the residual stream. PEFT and the released format add a vector to that output, which differs from adding "
            "it to the stream that leaves the layer. Use --format safetensors or gguf for such a model."
        )
    return f"{block}.{inner}"


def _small(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a random model of the same class and width, with two layers and a small vocabulary."""
    text: Any = copy.deepcopy(config.get_text_config(decoder=True))
    text.num_hidden_layers, text.vocab_size, text.intermediate_size = 2, _SMALL_VOCABULARY, _SMALL_MLP
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    except _CANNOT_BUILD as error:
        raise ValueError(
            f"could not build a small {type(config).__name__} to check where a vector can be added ({error}); "
            "use --format safetensors."
        ) from error
    model.eval()
    return model


@torch.no_grad()
def _shifts_the_stream(model: PreTrainedModel, inner: str) -> bool:
    site = decoder_layers(model)[0].get_submodule(inner)
    plain = _entering_second_layer(model)
    direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
    for size in (0.5, 3.0):  # two sizes: a norm would leave a vector of one particular length unchanged
        shift = size * direction
        handle = site.register_forward_hook(lambda _module, _args, output, shift=shift: output + shift)
        try:
            moved = _entering_second_layer(model) - plain
        finally:
            handle.remove()
        if not torch.allclose(moved, shift.expand_as(moved), atol=1e-3 * size):
            return False
    return True


def _entering_second_layer(model: PreTrainedModel) -> Tensor:
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = decoder_layers(model)[1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=torch.arange(8)[None], use_cache=False)
    finally:
        handle.remove()
    return seen[0]
