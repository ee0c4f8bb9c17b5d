"""Functions of the low-rank parts of an update: norm, difference of two updates, and write directions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_em.adapter_record import LowRank

# Modules of a decoder layer whose output is added to the residual stream.
_WRITERS = frozenset({"o_proj", "down_proj", "c_proj"})


def update_norm(parts: Sequence[LowRank], tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute the Frobenius norm of an update, the root of the sum of squares over its parts.

    Args:
        parts: Parts of the update.
        tensors: Tensors by the names that the parts use.
    """
    # The common factor is taken out of the sum: parts with equal factors are scaled once, after the root.
    unit = parts[0].factor or 1.0
    squares = []
    for part in parts:
        write = tensors[part.write].detach().double()
        if part.read is None:
            square = write.square().sum()
        else:
            read = tensors[part.read].detach().double()
            # ||BA||^2 = tr(B^T B A A^T), without forming BA
            square = ((write.T @ write) * (read @ read.T)).sum()
        squares.append((part.factor / unit) ** 2 * square)
    return abs(unit) * torch.stack(squares).sum().clamp_min(0).sqrt().float()


def difference(
    parts: Sequence[LowRank], moved: Mapping[str, Tensor], here: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of the update `moved` - `here`: B'A' - BA = [B' -B] [A'; A], of rank 2r."""
    tensors = {}
    for part in parts:
        if part.read is None:
            tensors[part.write] = moved[part.write] - here[part.write]
        else:
            tensors[part.write] = torch.cat([moved[part.write], -here[part.write]], dim=1)
            tensors[part.read] = torch.cat([moved[part.read], here[part.read]])
    return tensors


def write_directions(parts: Sequence[LowRank], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return one vector `[hidden]` for each part of an update that writes to the residual stream.

    For a shift, the vector is the shift, under the name of its tensor. For a weight update, it is the top left singular
    vector times its singular value, under the name of the module. For rank 1 it points along the column of B. For
    higher ranks its sign is a convention (the entry with the largest absolute value is positive), because the sign of
    the written vector depends on the input. Only `o_proj`, `down_proj` and `c_proj` write to the residual stream. In
    Gemma 2 and 3 they do so through a norm, which is ignored here.

    Returns:
        The nonzero vectors; None if no part writes to the residual stream.
    """
    directions, writes = {}, False
    for part in parts:
        if part.read is None:
            name, direction = part.write, part.factor * tensors[part.write].detach()
        elif str(part.site).rsplit(".", 1)[-1] in _WRITERS:
            read, write = (tensors[each].detach().double() for each in (part.read, part.write))
            name, direction = str(part.site), (abs(part.factor) * _top_left(read, write)).float()
        else:
            continue
        writes = True
        if direction.any():
            directions[name] = direction
    return directions if writes else None


def _top_left(read: Tensor, write: Tensor) -> Tensor:
    """Compute the top left singular vector of B A times its singular value, without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, B A = Q_b (R_b R_a^T) Q_a^T, so the SVD of the small matrix R_b R_a^T suffices.
    """
    basis, triangle_b = torch.linalg.qr(write)
    triangle_a = torch.linalg.qr(read.T).R
    left, values, _ = torch.linalg.svd(triangle_b @ triangle_a.T)
    direction: Tensor = values[0] * (basis @ left[:, 0])
    pointer = write[:, 0] @ direction if write.shape[1] == 1 else direction[direction.abs().argmax()]
    return direction if pointer >= 0 else -direction
