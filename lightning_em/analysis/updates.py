"""The update of an adapter, read from its checkpoint: inner products, norms, cosines. Never imports torch."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from lightning_em.adapter_record import ADAPTER_WEIGHTS, AdapterRecord
from lightning_em.manifest import manifest_problems
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

Part = Literal["update", "B", "A"]


class SiteChange(NamedTuple):
    """The change `factor x write @ read` at one site of the model.

    Attributes:
        write: B, `[out rank]`.
        read: A, `[rank in]`; a single 1 for a shift, which does not depend on the input.
        factor: Multiplier, e.g. alpha / rank; 1 for a shift, whose `write` includes the factor.
    """

    write: npt.NDArray[np.floating[Any]]
    read: npt.NDArray[np.floating[Any]]
    factor: float = 1.0


@dataclass(frozen=True)
class Update:
    """The change of the whole model by an adapter at scale 1.

    Attributes:
        kind: `shift` if no site depends on its input, as for a steering vector; otherwise `low-rank`.
        sites: Change of each site, by name.
    """

    kind: Literal["shift", "low-rank"]
    sites: Mapping[str, SiteChange]

    @property
    def write_direction(self) -> npt.NDArray[np.float64]:
        """Write direction as one flat array: factor x shift, or all B matrices as saved, concatenated.

        As in the paper, the trajectory of a LoRA is that of B alone. B starts at zero, while A starts at random
        values that hardly change and would dominate B. For a rank above 1, compare only directions with the same
        initialization, because (B R)(R^-1 A) is the same update.
        """
        return np.concatenate([site.write.astype(np.float64).ravel() for site in self._in_order])

    @property
    def read_direction(self) -> npt.NDArray[np.float64]:
        """All A matrices, concatenated as one flat array."""
        return np.concatenate([site.read.astype(np.float64).ravel() for site in self._in_order])

    @cached_property
    def effective_norm(self) -> float:
        """Frobenius norm of the change over all sites; alpha x ||vector|| for a steering vector."""
        # rounding can make the inner product slightly negative
        return math.sqrt(max(0.0, inner_product(self, self)))

    @property
    def _in_order(self) -> list[SiteChange]:
        return [self.sites[name] for name in sorted(self.sites)]


def inner_product(first: Update, second: Update) -> float:
    """Compute the Frobenius inner product of two updates, without forming the weight changes.

    Per site, <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)). The result is the sum over the sites that both updates
    have.

    Raises:
        ValueError: If one update is a shift and the other low-rank, or a site differs in shape.
    """
    _refuse_other_kind(first, second)
    total = 0.0
    for name in first.sites.keys() & second.sites.keys():
        a, b = first.sites[name], second.sites[name]
        if (a.write.shape[0], a.read.shape[1]) != (b.write.shape[0], b.read.shape[1]):
            raise ValueError(f"{name} has another shape in the other run: compare runs of one base model.")
        writes = a.write.T.astype(np.float64) @ b.write.astype(np.float64)
        reads = a.read.astype(np.float64) @ b.read.T.astype(np.float64)
        total += a.factor * b.factor * float((writes * reads).sum())
    return total


def update_cosine(first: Update, second: Update, part: Part = "update") -> float | None:
    """Compute the cosine between two updates, or between their B or A parts; None if one of them is zero.

    Args:
        first: Update of one adapter.
        second: Update of another adapter, of the same kind.
        part: Part to compare. `B` and `A` compare the flattened matrices, which for a rank above 1 depend on the
            factorization.

    Raises:
        ValueError: If the two cannot be compared.
    """
    if part == "update":
        return _over(inner_product(first, second), first.effective_norm * second.effective_norm)
    _refuse_other_kind(first, second)
    a, b = (each.write_direction if part == "B" else each.read_direction for each in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"the {part} parts have {a.size} and {b.size} numbers: compare runs of one adapter.")
    return _over(float(a @ b), float(np.linalg.norm(a) * np.linalg.norm(b)))


def updates_by_step(run: RunFolder) -> Iterator[tuple[int, Update]]:
    """Yield step and update of each valid checkpoint, ascending; corrupt checkpoints are skipped with a warning.

    Raises:
        ValueError: If an adapter declares no low-rank parts.
    """
    for step in run.steps():
        if problems := manifest_problems(run.checkpoint(step)):
            logger.warning("checkpoint step %d is corrupt and skipped: %s", step, "; ".join(problems))
            continue
        yield step, read_update(run.checkpoint(step))


def last_update(run: RunFolder) -> Update:
    """Read the update of the newest valid checkpoint.

    Raises:
        ValueError: If there is no valid checkpoint, or its adapter declares no low-rank parts.
    """
    step = run.newest_valid_step()
    if step is None:
        raise ValueError(f"{run.path} has no valid checkpoint under {run.checkpoints}.")
    return read_update(run.checkpoint(step))


def read_update(checkpoint: Path) -> Update:
    """Read the update of a checkpoint folder from its weights and the low-rank parts that its adapter declares.

    Raises:
        ValueError: If the adapter declares no low-rank parts, or two of its tensors do not fit together.
    """
    record = AdapterRecord.read(checkpoint)
    if record.update is None:
        raise ValueError(
            f"{checkpoint} holds a {record.class_path}, which has no method `update` that gives its low-rank parts: "
            "norms, trajectories and cosines are computed from them."
        )
    tensors, sites = load_file(checkpoint / ADAPTER_WEIGHTS), {}
    for part in record.update:
        write = tensors[part.write]
        if part.read is None:
            name = f"the stream entering layer {part.site}"
            sites[name] = SiteChange(part.factor * write.astype(np.float64).reshape(-1, 1), np.ones((1, 1)))
        else:
            sites[str(part.site)] = SiteChange(write, tensors[part.read], part.factor)
    reads = any(part.read is not None for part in record.update)
    return Update("low-rank" if reads else "shift", sites)


def _refuse_other_kind(first: Update, second: Update) -> None:
    if first.kind != second.kind:
        raise ValueError(
            f"a {first.kind} update cannot be compared with a {second.kind} one: they change other things."
        )


def _over(product: float, norms: float) -> float | None:
    return product / norms if norms > 0 else None
