"""Base class of all probes: observers that measure a model without changing it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, final

import torch

from lightning_em.batch import CountedPositions, PackedBatch
from lightning_em.data import ChatEncoder
from lightning_em.models import AdaptedModel
from lightning_em.probes.untouched import untouched
from lightning_em.records import Point, ProbeResult, Quantity, declaration_of
from lightning_em.runs import RunFolder

Stream = Literal["narrow", "kl"]
EFFECTIVE_NORM = Quantity("effective_norm", "norm", in_study="every", of_checkpoint=True)


@dataclass(frozen=True)
class ProbeExamples:
    """The fixed rows on which every checkpoint is measured.

    Attributes:
        narrow: Rows of the narrow data, for cross-entropy.
        kl: Rows of the KL data; may be empty.
        encoder: Encoder of the run's rows, for probes that sample answers or encode rows of their own; None if the
            rows did not come from a run.
    """

    narrow: list[PackedBatch]
    kl: list[PackedBatch] = field(default_factory=list)
    encoder: ChatEncoder | None = None

    def __post_init__(self) -> None:
        for batch in (*self.narrow, *self.kl):
            rows = batch.row_of_token()[batch.counted("response")]
            counts = torch.bincount(rows, minlength=batch.num_rows).tolist()
            empty = [row_id for row_id, count in zip(batch.row_ids, counts, strict=True) if count == 0]
            if empty:
                raise ValueError(f"probe rows {empty} have no response token to predict; leave them out.")

    @property
    def narrow_row_ids(self) -> tuple[str, ...]:
        """Ids of the narrow rows, in the order of the `per_example` values of CE."""
        return tuple(row_id for batch in self.narrow for row_id in batch.row_ids)

    @property
    def kl_row_ids(self) -> tuple[str, ...]:
        """Ids of the KL rows, in the order of the `per_example` values of KL."""
        return tuple(row_id for batch in self.kl for row_id in batch.row_ids)

    def only(self, streams: Sequence[Stream]) -> "ProbeExamples":
        """Return the rows of some streams, with the same encoder."""
        narrow = self.narrow if "narrow" in streams else []
        return replace(self, narrow=narrow, kl=self.kl if "kl" in streams else [])

    def to(self, device: torch.device | str) -> "ProbeExamples":
        """Return the same rows on `device`."""
        return ProbeExamples(
            [b.to(device) for b in self.narrow], [b.to(device) for b in self.kl], self.encoder
        )


class Probe(ABC):
    """One measurement of a model at a checkpoint. A subclass implements `measure` and `settings`.

    Every rank runs the probe on the same rows and obtains the same values.
    `lightning_em.testing.check_probe` checks the contract.

    Attributes:
        name: Name of the probe and of its record file, `probes/<name>.jsonl`.
        quantities: What the probe measures. Each point must have the name, unit and coordinates of one of them.
        grid: Settings that only choose the coordinates, such as `scales`. Values on different grids are comparable.
        reads: Streams of the probe rows that the probe reads. It is given no rows of other streams.
        needs_gradients: Whether the probe computes gradients.
        max_new_tokens: Maximum number of tokens that the probe samples after each prompt; 0 if it samples none.
        batch_size: Number of rows in one forward pass; 0 if the probe uses the batches that it is given.
    """

    name: ClassVar[str]
    quantities: Sequence[Quantity]
    grid: ClassVar[tuple[str, ...]] = ()
    reads: Sequence[Stream] = ("narrow", "kl")
    needs_gradients: ClassVar[bool] = False
    max_new_tokens: int = 0
    batch_size: int = 0

    @property
    def needs_generation(self) -> bool:
        """Whether the probe samples answers."""
        return self.max_new_tokens > 0

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return all settings that the values depend on, serializable as JSON.

        Records with different settings, such as another grid, count as different measurements.
        """

    def for_checkpoint(self, run: RunFolder, step: int) -> "Probe":
        """Return the probe for this checkpoint: `self`, or a copy that also reads the run's earlier checkpoints.

        Called on every rank after the checkpoint of `step` is on disk. Name and settings must stay the same.
        """
        return self

    @abstractmethod
    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        """Measure `model`.

        `run` calls this method in eval mode with gradients disabled. A probe that needs gradients enables them
        itself.

        Args:
            model: Model to measure.
            examples: Rows of the streams that the probe reads.
        """

    @final
    def run(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        """Measure `model` in eval mode, then restore its state, even if the measurement raises.

        Weights, gradients, train/eval mode, `requires_grad`, adapter scale and all random states are
        bit-identical afterwards.

        Raises:
            RuntimeError: If the measurement wrote into the frozen base model.
            ValueError: If a point is not one of the declared `quantities`.
        """
        with untouched(model), torch.no_grad():
            model.eval()
            points = self.measure(model, examples.only(self.reads))
            for point in points:
                declaration_of(point, self.quantities, self.name)
            return points

    @final
    def record(
        self,
        model: AdaptedModel,
        examples: ProbeExamples,
        step: int,
        base: str | None = None,
        data: Mapping[str, str] | None = None,
    ) -> ProbeResult:
        """Run the probe and return the record for `probes/<name>.jsonl`; see `run`.

        Args:
            model: Model to measure.
            examples: Rows to measure it on.
            step: Optimizer steps taken when the checkpoint was written.
            base: Hash of the base model.
            data: Hash of the run's training rows by stream.
        """
        own = examples.only(self.reads)
        return ProbeResult(
            probe=self.name,
            step=step,
            settings=self.settings(),
            points=tuple(self.run(model, own)),
            examples=own.narrow_row_ids,
            kl_examples=own.kl_row_ids,
            base=base,
            data=data or {},
            quantities=tuple(self.quantities),
            grid=self.grid,
        )


@dataclass(frozen=True)
class RowMeans:
    """Loss of every probe row in one state of the model, with the statistics that probes report.

    Attributes:
        sums: Loss of each row in nats, summed over its counted tokens; float64 on the CPU.
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
        """Compute the cross-entropy of every row in each state of the adapter.

        Args:
            model: Model to measure.
            batches: Rows to measure it on.
            states: Factories of context managers that set the adapter, e.g. `partial(adapter.at_scale, 0.5)`.
        """
        return [cls(each.sums.cpu(), each.counts.cpu()) for each in model.sweep_row_ce(batches, states)]

    @classmethod
    def of_kl(
        cls,
        model: AdaptedModel,
        batches: list[PackedBatch],
        states: Sequence[Callable[[], AbstractContextManager[object]]],
        kl_positions: CountedPositions,
    ) -> "list[RowMeans]":
        """Compute the KL from the reference of every row in each state of the adapter; see `of_ce`."""
        losses = model.sweep_row_kl(batches, states, kl_positions)
        return [cls(each.sums.cpu(), each.counts.cpu()) for each in losses]

    def restored(self, order: Sequence[int]) -> "RowMeans":
        """Return the rows in their original order.

        Args:
            order: Original index of each row, as passed when the rows were reordered.
        """
        # argsort inverts a permutation
        places = torch.tensor(order).argsort()
        return RowMeans(self.sums[places], self.counts[places])

    def __sub__(self, other: "RowMeans") -> "RowMeans":
        """Return the paired difference over the same rows, in which the variation between rows cancels."""
        return RowMeans(self.sums - other.sums, self.counts)

    @property
    def mean(self) -> float:
        """Mean in nats per token: total sum over total count, as in the training loss; longer rows weigh more."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def standard_error(self) -> float | None:
        """Standard error of `mean`, with the row as the unit of sampling; None for a single row."""
        num_rows = len(self.sums)
        if num_rows < 2:
            return None
        # `mean` is a ratio of two sums over rows, so its variance is that of the linearized ratio estimator
        residuals = self.sums - self.mean * self.counts
        variance = num_rows / (num_rows - 1) * residuals.square().sum()
        return float(variance.sqrt() / self.counts.sum())

    def point(self, quantity: str, coordinates: Mapping[str, float | int | str]) -> Point:
        """Return the mean over tokens as a point, with the mean of each row in `per_example`."""
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
        """Return the counted tokens of each row: the weights of the `per_example` values in the mean."""
        total = int(self.counts.sum())
        return Point(quantity, float(total), "tokens", count=total, per_example=tuple(self.counts.tolist()))


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Standard error of a mean with clusters as the unit of sampling; None for a single cluster.

    Args:
        values: One value per item.
        clusters: Cluster of each item.

    Source: the linearized estimator of a ratio of cluster totals, as in `RowMeans.standard_error`.
    """
    mean = sum(values) / len(values)
    residuals: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    count = len(residuals)
    if count < 2:
        return None
    variance = (
        count / (count - 1) * torch.tensor(list(residuals.values()), dtype=torch.float64).square().sum()
    )
    return float(variance.sqrt()) / len(values)
