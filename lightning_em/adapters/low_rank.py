"""What follows from an update's low-rank parts: its norm, distances between updates, the directions it writes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_em.adapter_record import LowRank

# Modules of a decoder layer whose output is added to the residual stream.
_WRITERS = frozenset({"o_proj", "down_proj"})


def update_norm(parts: Sequence[LowRank], tensors: Mapping[str, Tensor]) -> Tensor:
    """Frobenius norm of an update, root of the sum of squares over its parts.

    Args:
        parts: The update.
        tensors: The tensors that the parts name.
    """
    unit = (
        parts[0].factor or 1.0
    )  # taken out of the sum: parts of one factor are multiplied once, after the root
    squares = []
    for part in parts:
        write = tensors[part.write].detach().double()
        if part.read is None:
            square = write.square().sum()
        else:
            read = tensors[part.read].detach().double()
            square = ((write.T @ write) * (read @ read.T)).sum()  # ||BA||^2 without forming BA
        squares.append((part.factor / unit) ** 2 * square)
    return abs(unit) * torch.stack(squares).sum().clamp_min(0).sqrt().float()


def difference(
    parts: Sequence[LowRank], moved: Mapping[str, Tensor], here: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of `moved` less `here`: B'A' - BA = [B' -B] [A'; A], an update of rank 2r."""
    tensors = {}
    for part in parts:
        if part.read is None:
            tensors[part.write] = moved[part.write] - here[part.write]
        else:
            tensors[part.write] = torch.cat([moved[part.write], -here[part.write]], dim=1)
            tensors[part.read] = torch.cat([moved[part.read], here[part.read]])
    return tensors


def write_directions(parts: Sequence[LowRank], tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What an update adds to the residual stream, as one vector `[hidden]` for each part that writes there.

    Of a shift it is the shift, under its tensor's name; of a weight change, under the module's name, the top
    left singular vector times its singular value. For rank 1 that points along the column of B. For higher ranks
    its sign is a convention (the largest entry is positive): the input decides with which sign it is written.
    Only `o_proj` and `down_proj` write into the residual stream (in Gemma-2 and -3 through a norm that is left
    out here).

    Returns:
        The vectors that are not zero; None if no part writes into the residual stream.
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
    """Top left singular vector of B A times its singular value, without forming B A."""
    basis, triangle_b = torch.linalg.qr(write)
    triangle_a = torch.linalg.qr(read.T).R
    left, values, _ = torch.linalg.svd(triangle_b @ triangle_a.T)
    direction: Tensor = values[0] * (basis @ left[:, 0])
    pointer = write[:, 0] @ direction if write.shape[1] == 1 else direction[direction.abs().argmax()]
    return direction if pointer >= 0 else -direction
