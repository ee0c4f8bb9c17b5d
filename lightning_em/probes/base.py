"""What every probe is: an observer that measures a model and leaves no trace."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch

from lightning_em.batch import CountedPositions, PackedBatch
from lightning_em.models import AdaptedModel
from lightning_em.probes.untouched import untouched
from lightning_em.records import Point, ProbeResult
from lightning_em.runs import RunFolder


@dataclass(frozen=True)
class ProbeExamples:
    """The fixed rows that every checkpoint is measured on.

    Attributes:
        narrow: Rows of the narrow data, for cross-entropy.
        kl: Rows of the parallel data, for KL; may be empty.
    """

    narrow: list[PackedBatch]
    kl: list[PackedBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        for batch in (*self.narrow, *self.kl):
            rows = batch.row_of_token()[batch.counted("response")]
            counts = torch.bincount(rows, minlength=batch.num_rows).tolist()
            empty = [row_id for row_id, count in zip(batch.row_ids, counts, strict=True) if count == 0]
            if empty:
                raise ValueError(f"probe rows {empty} have no response token to predict; leave them out.")

    @property
    def narrow_row_ids(self) -> tuple[str, ...]:
        """Ids of the narrow rows, in order; `per_example` values of CE refer to them."""
        return tuple(row_id for batch in self.narrow for row_id in batch.row_ids)

    @property
    def kl_row_ids(self) -> tuple[str, ...]:
        """Ids of the parallel rows, in order; `per_example` values of KL refer to them."""
        return tuple(row_id for batch in self.kl for row_id in batch.row_ids)

    def to(self, device: torch.device | str) -> "ProbeExamples":
        """The same rows on `device`."""
        return ProbeExamples([b.to(device) for b in self.narrow], [b.to(device) for b in self.kl])


class Probe(ABC):
    """One measurement of a model at a checkpoint. A subclass implements `measure` and `settings`.

    Every rank runs it on the same rows and finds the same values.
    `lightning_em.testing.check_probe` checks the contract.

    Attributes:
        name: Names the record file, `probes/<name>.jsonl`.
    """

    name: ClassVar[str]

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What the measurement depends on, ready for JSON: another grid is another measurement."""

    def for_checkpoint(self, run: RunFolder, step: int) -> "Probe":
        """The probe that measures this checkpoint: itself, or a copy that looks at the run's earlier ones too.

        Called on every rank, once the checkpoint of `step` is on disk. Name and settings stay the same.
        """
        return self

    @abstractmethod
    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        """Measure `model`; called by `run`, without gradients unless it turns them on itself."""

    @final
    def run(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        """Measure `model` in eval mode and leave no trace, also when the measurement raises.

        Weights, gradients, train/eval mode, `requires_grad`, adapter scale and every random state are
        bit-identical afterwards.

        Raises:
            RuntimeError: If the measurement wrote into the frozen base.
        """
        with untouched(model), torch.no_grad():
            model.eval()
            return self.measure(model, examples)

    @final
    def record(
        self, model: AdaptedModel, examples: ProbeExamples, step: int, world: str | None = None
    ) -> ProbeResult:
        """Run and put the points into the line that is written to `probes/<name>.jsonl`.

        Args:
            model: What is measured.
            examples: On which rows.
            step: Optimiser steps taken when the checkpoint was written.
            world: Recipe hash of the miniature world, if any.
        """
        return ProbeResult(
            probe=self.name,
            step=step,
            settings=self.settings(),
            points=tuple(self.run(model, examples)),
            examples=examples.narrow_row_ids,
            kl_examples=examples.kl_row_ids,
            world=world,
        )


@dataclass(frozen=True)
class RowMeans:
    """Loss of every probe row at one setting of the model, with the statistics that probes report.

    Attributes:
        sums: Nats of each row over its counted tokens, float64 on the CPU.
        counts: Counted tokens of each row.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of_ce(
        cls,
        model: AdaptedModel,
        batches: list[PackedBatch],
        states: Sequence[Callable[[], AbstractContextManager[object]]],
    ) -> "list[RowMeans]":
        """Cross-entropy of every row in each state of the adapter, e.g. `partial(adapter.at_scale, 0.5)`."""
        return [cls(each.sums.cpu(), each.counts.cpu()) for each in model.sweep_row_ce(batches, states)]

    @classmethod
    def of_kl(
        cls,
        model: AdaptedModel,
        batches: list[PackedBatch],
        states: Sequence[Callable[[], AbstractContextManager[object]]],
        kl_positions: CountedPositions,
    ) -> "list[RowMeans]":
        """KL from the reference of every row in each state of the adapter."""
        losses = model.sweep_row_kl(batches, states, kl_positions)
        return [cls(each.sums.cpu(), each.counts.cpu()) for each in losses]

    def restored(self, order: Sequence[int]) -> "RowMeans":
        """The rows as they were before they were put into this order."""
        places = torch.tensor(order).argsort()
        return RowMeans(self.sums[places], self.counts[places])

    def __sub__(self, other: "RowMeans") -> "RowMeans":
        """Paired difference: the same rows, so that what they have in common cancels."""
        return RowMeans(self.sums - other.sums, self.counts)

    @property
    def mean(self) -> float:
        """Nats per token: all sums over all counts, as in the training loss. Long rows weigh more."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def standard_error(self) -> float | None:
        """Of `mean` as a ratio of sums over rows, rows being the unit; None for a single row."""
        num_rows = len(self.sums)
        if num_rows < 2:
            return None
        residuals = self.sums - self.mean * self.counts
        variance = num_rows / (num_rows - 1) * residuals.square().sum()
        return float(variance.sqrt() / self.counts.sum())

    def point(self, quantity: str, coordinates: Mapping[str, float | int | str]) -> Point:
        """The mean over tokens as a point, with the mean of each row beside it."""
        return Point(
            quantity=quantity,
            value=self.mean,
            unit="nats_per_token",
            coordinates=coordinates,
            standard_error=self.standard_error,
            count=int(self.counts.sum()),
            per_example=tuple((self.sums / self.counts).tolist()),
        )

    def token_counts(self, quantity: str) -> Point:
        """Counted tokens of each row: the weights with which `per_example` values make the mean."""
        total = int(self.counts.sum())
        return Point(quantity, float(total), "tokens", count=total, per_example=tuple(self.counts.tolist()))
