"""How far a perturbed adapter is from the trained one, in the unit of its effective norm."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_em.adapters import Adapter, LoRA
from lightning_em.adapters.base import orthogonal_noise

_LORA_A = ".lora_A.weight"


def displacement_from_here(adapter: Adapter) -> Callable[[], float] | None:
    """A function that gives the effective norm of what the update has changed by since now.

    Known for a `LoRA`, and for an adapter whose effective norm is that of an update linear in the parameters
    (the parallelogram law tells), such as a steering vector; it is then the norm at their difference.

    Args:
        adapter: At the point to measure from.

    Returns:
        The function, which leaves the adapter as it is; None for another adapter, or one without a norm.
    """
    if adapter.effective_norm() is None:
        return None
    here = {name: parameter.detach().clone() for name, parameter in adapter.trainable().items()}
    stacked = isinstance(adapter, LoRA)
    if not stacked and not _is_linear(adapter, here):
        return None

    def displacement() -> float:
        moved = {name: parameter.detach() for name, parameter in adapter.trainable().items()}
        return _norm_at(adapter, _stacked(moved, here) if stacked else _sum(moved, here, -1))

    return displacement


def _stacked(moved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B'A' - BA = [B' -B] [A'; A]: the difference of two updates of rank r is one of rank 2r."""
    return {
        name: torch.cat([tensor, here[name]])
        if name.endswith(_LORA_A)
        else torch.cat([tensor, -here[name]], dim=1)
        for name, tensor in moved.items()
    }


def _is_linear(adapter: Adapter, here: Mapping[str, Tensor]) -> bool:
    """||x + y||^2 + ||x - y||^2 = 2 ||x||^2 + 2 ||y||^2 with noise y, which a product of matrices breaks."""
    generator = torch.Generator().manual_seed(0)
    noise = {name: orthogonal_noise(tensor, generator) for name, tensor in here.items()}
    sides = 2 * _norm_at(adapter, here) ** 2 + 2 * _norm_at(adapter, noise) ** 2
    diagonals = sum(_norm_at(adapter, _sum(here, noise, sign)) ** 2 for sign in (1, -1))
    return abs(diagonals - sides) <= 1e-3 * sides


def _sum(one: Mapping[str, Tensor], other: Mapping[str, Tensor], sign: int) -> dict[str, Tensor]:
    return {name: tensor + sign * other[name] for name, tensor in one.items()}


def _norm_at(adapter: Adapter, tensors: Mapping[str, Tensor]) -> float:
    """Effective norm with other parameters, of the shapes that `tensors` have."""
    own = adapter.trainable()
    kept = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = tensors[name]
        norm = adapter.effective_norm()
        assert norm is not None
        return norm.item()
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]
