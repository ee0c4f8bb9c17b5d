"""Restore a model and all random generators bit for bit after a measurement."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_em.models import AdaptedModel


@contextmanager
def untouched(model: AdaptedModel, check_base: bool = True) -> Iterator[None]:
    """Restore the state of the model and of all random generators after the block, even if it raises.

    Adapter weights, gradients, `requires_grad`, training flags, adapter scale and the states of all
    random generators (torch, CUDA, NumPy, Python) are bit-identical afterwards.

    Args:
        model: Model to restore.
        check_base: Raise if the block wrote into the frozen base model, which is too large to copy and restore.

    Raises:
        RuntimeError: If the block wrote into the frozen base model.
    """
    with ExitStack() as stack:
        # ExitStack runs all callbacks in reverse order, even if one of them raises.
        stack.callback(_keep_random_states())
        if check_base:
            stack.callback(_base_check(model))
        stack.callback(_keep_modes(model))
        stack.callback(_keep_adapter(model))
        yield


def _keep_random_states() -> Callable[[], None]:
    # not Lightning's isolate_rng: it restores nothing if the block raises
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)

    return restore


def _keep_modes(model: AdaptedModel) -> Callable[[], None]:
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, flag in training:
            module.training = flag  # not .train(): it also sets the children, and AdaptedModel overrides it
        for parameter, flag, gradient in trainable:
            parameter.requires_grad_(flag)
            parameter.grad = gradient  # the same tensor object; _keep_adapter restores its values

    return restore


def _keep_adapter(model: AdaptedModel) -> Callable[[], None]:
    adapter = model.adapter
    scale = adapter.scale
    parameters = list(adapter.trainable().values())
    values = [parameter.detach().clone() for parameter in parameters]
    kept = [(p.grad, p.grad.detach().clone()) for p in parameters if p.grad is not None]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            for gradient, value in kept:
                gradient.copy_(value)
        adapter.scale = scale

    return restore


def _base_check(model: AdaptedModel) -> Callable[[], None]:
    own = {id(parameter) for parameter in model.adapter.trainable().values()}
    frozen = [(name, t) for name, t in _tensors(model) if id(t) not in own]
    before = [_fingerprint(tensor) for _, tensor in frozen]

    def check() -> None:
        pairs = zip(frozen, before, strict=True)
        changed = [name for (name, tensor), mark in pairs if _fingerprint(tensor) != mark]
        if changed:
            raise RuntimeError(
                f"a probe wrote into the frozen base ({len(changed)} tensors: {changed[:3]}...), which "
                "cannot be undone: resume from the checkpoint, without this probe."
            )

    return check


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    # PyTorch counts in-place writes in `_version`; hashing all weights of a large base would take seconds
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
