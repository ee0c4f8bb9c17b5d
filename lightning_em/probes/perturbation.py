"""Loss as a function of noise in the adapter's weights: the stability of a solution."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_em.batch import PackedBatch
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans
from lightning_em.probes.displacement import displacement_from_here
from lightning_em.records import Point, Quantity

logger = logging.getLogger(__name__)

_UNITS = {
    "ce": "nats_per_token", "ce_increase": "nats_per_token", "relative_increase": "ratio", "lost_gain": "percent",
    "displacement": "norm",
}  # fmt: skip


class PerturbationCurve(Probe):
    """Training-set cross-entropy under `adapter.perturbed(strength)`, for several noise seeds.

    Quantities, with the losses L_e at strength e, L_0 of the trained adapter and L_base of the base model:
        `ce`: L_0 (`strength: 0`), and L_e for each `strength` and `noise`, nats per token.
        `ce_increase`: L_e - L_0, paired over rows, nats per token, for each `strength` and `noise`.
        `ce_base`: L_base, nats per token.
        `lost_gain`: 100 (L_e - L_0) / (L_base - L_0), percent; omitted if the adapter does not lower the loss.
        `relative_increase`: (L_e - L_0) / L_0, a ratio.
        `displacement` (unit norm): effective norm of (perturbed update - trained update), for each `strength`
            and `noise`.
        `ce_tokens`: counted tokens of each row.

    Quantities that depend on the noise are summarized over the noise seeds as `<name>_mean` and `<name>_sd` at
    each `strength`; `count` is the number of noise seeds. `lost_gain` and `relative_increase` exist only as such
    summaries. The spread over noise seeds shows how much the noise direction matters for one solution. Use
    training seeds to compare two solutions.

    Noise of equal strength has equal *relative* size: it moves a vector by sqrt(2 - 2 sqrt(1 - e^2)) times its
    own effective norm, so it moves a longer vector farther. Noise of equal *absolute* size has equal
    `displacement`: alpha ||v' - v|| for a vector; for a LoRA the Frobenius norm of (alpha / rank) (B'A' - BA)
    (or alpha / sqrt(rank)), as the root of the sum of squares over modules. To compare two solutions under such
    noise, interpolate `ce_increase` of both at one displacement. Only adapters of one type share this unit.
    `displacement` is omitted, with a message, for adapters whose `update` gives no low-rank parts: a norm alone
    does not define a distance.

    The noise of a given index is the same in every run and at every strength, so curves are paired. It is drawn
    in float64, parameter by parameter, from a `torch.Generator` on the CPU. The generator's seed is the first
    uint64 of `numpy.random.SeedSequence((seed, noise))`.
    Loss is the mean over tokens as in training. Standard errors of single points take rows as the unit.

    If `noise_examples` is set, only that many rows are measured under noise, the same ones at every checkpoint.
    L_e - L_0 is then paired on these rows, L_e is L_0 of all rows plus that difference, and quantities that
    depend on the noise have no `per_example` values.

    Args:
        strengths: Grid of e.
        num_seeds: Number of noise directions.
        seed: Seed of all noise directions and of the choice of rows under noise.
        noise_examples: Number of rows under noise, drawn from the probe's rows. Defaults to all rows.

    Raises:
        ValueError: If a strength is not between 0 and 1, or there is no direction or row.

    Source: arXiv:2602.07852 (stability).
    """

    name = "perturbation_curve"
    quantities = (
        Quantity("ce_base", "nats_per_token", in_study="none"),
        Quantity("ce_tokens", "tokens", in_study="none"),
        Quantity("ce", "nats_per_token", ("strength",), in_study="none"),  # at strength 0
        *(
            Quantity(name, unit, ("strength", "noise"), in_study="none")
            for name, unit in _UNITS.items()
            if name in ("ce", "ce_increase", "displacement")
        ),
        *(Quantity(f"{name}_mean", unit, ("strength",)) for name, unit in _UNITS.items()),
        *(Quantity(f"{name}_sd", unit, ("strength",), in_study="none") for name, unit in _UNITS.items()),
    )
    grid = ("strengths",)
    reads = ("narrow",)

    def __init__(
        self,
        strengths: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        num_seeds: int = 10,
        seed: int = 0,
        noise_examples: int | None = None,
    ) -> None:
        if not strengths or not all(0 < strength <= 1 for strength in strengths):
            raise ValueError(
                f"strengths must lie above 0 and not above 1, got {list(strengths)}; "
                "set init_args.strengths of PerturbationCurve."
            )
        if num_seeds < 1 or seed < 0:
            raise ValueError(
                f"num_seeds must be 1 or more and seed not negative, got {num_seeds} and {seed}; "
                "set init_args of PerturbationCurve."
            )
        if noise_examples is not None and noise_examples < 1:
            raise ValueError(
                f"noise_examples must be 1 or more, got {noise_examples}; set init_args of PerturbationCurve."
            )
        self.strengths = sorted({float(strength) for strength in strengths})
        self.num_seeds, self.seed, self.noise_examples = num_seeds, seed, noise_examples

    def settings(self) -> Mapping[str, Any]:
        settings = {"strengths": self.strengths, "num_seeds": self.num_seeds, "seed": self.seed}
        return settings if self.noise_examples is None else settings | {"noise_examples": self.noise_examples}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        grid = [(strength, noise) for strength in self.strengths for noise in range(self.num_seeds)]
        ends = [partial(model.adapter.at_scale, scale) for scale in (0.0, 1.0)]
        states = [partial(self._perturbed, model, *place) for place in grid]
        subset = self._subset(examples.narrow)
        if subset is None:
            base, trained, *perturbed = RowMeans.of_ce(model, examples.narrow, [*ends, *states])
            paired = trained
        else:
            # L_0 on the same subset, so that L_e - L_0 stays paired over rows
            base, trained = RowMeans.of_ce(model, examples.narrow, ends)
            paired, *perturbed = RowMeans.of_ce(model, subset, [ends[1], *states])
        points = [base.point("ce_base", {}), trained.point("ce", {"strength": 0.0})]
        points.append(base.token_counts("ce_tokens"))
        means = []
        for (strength, noise), row_means in zip(grid, perturbed, strict=True):
            place = {"strength": strength, "noise": noise}
            increase = (row_means - paired).point("ce_increase", place)
            loss = row_means.point("ce", place)
            if subset is not None:
                increase = replace(increase, per_example=None)
                loss = Point("ce", trained.mean + increase.value, loss.unit, place, None, increase.count)
            means.append(loss.value)
            points += [loss, increase]
        gain = base.mean - trained.mean
        if gain <= 0:
            message = "the adapter is not better than the base: %s has no share of its gain to report."
            rank_zero_only(logger.info)(message, self.name)
        curve = zip(self.strengths, np.array(means).reshape(-1, self.num_seeds), strict=True)
        points += [point for at, values in curve for point in _summaries(at, values, trained.mean, gain)]
        return points + self._displacements(model)

    def _displacements(self, model: AdaptedModel) -> list[Point]:
        """Displacement of the update by each noise, and its summary at each strength."""
        displacement = displacement_from_here(model.adapter)
        if displacement is None:
            message = (
                "%s does not tell how far two of its updates are apart: points of %s carry no displacement."
            )
            rank_zero_only(logger.info)(message, type(model.adapter).__name__, self.name)
            return []
        points = []
        for strength in self.strengths:
            found = []
            for noise in range(self.num_seeds):
                with self._perturbed(model, strength, noise):
                    found.append(displacement())
                points.append(
                    Point("displacement", found[-1], "norm", {"strength": strength, "noise": noise})
                )
            points += _summary("displacement", np.array(found), strength)
        return points

    def _subset(self, batches: list[PackedBatch]) -> list[PackedBatch] | None:
        """The rows under noise in their order and batches; None if all rows are used."""
        num_rows = sum(batch.num_rows for batch in batches)
        if self.noise_examples is None or self.noise_examples >= num_rows:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        chosen = set(torch.randperm(num_rows, generator=generator)[: self.noise_examples].tolist())
        place, found = 0, []
        for batch in batches:
            rows = [index for index in range(batch.num_rows) if place + index in chosen]
            place += batch.num_rows
            if rows:
                found.append(batch.select(rows))
        return found

    @contextmanager
    def _perturbed(self, model: AdaptedModel, strength: float, noise: int) -> Iterator[None]:
        # SeedSequence mixes both numbers: `seed + noise` would give neighboring probe seeds the same directions
        state = np.random.SeedSequence((self.seed, noise)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        with model.adapter.at_scale(1.0), model.adapter.perturbed(strength, generator):
            yield


def _summaries(strength: float, values: npt.NDArray[np.float64], trained: float, gain: float) -> list[Point]:
    """All summaries over the noise seeds at one strength."""
    increases = values - trained
    points = _summary("ce", values, strength) + _summary("ce_increase", increases, strength)
    if trained > 0:
        points += _summary("relative_increase", increases / trained, strength)
    if gain > 0:
        points += _summary("lost_gain", 100 * increases / gain, strength)
    return points


def _summary(quantity: str, values: npt.NDArray[np.float64], strength: float) -> list[Point]:
    """Mean over the noise seeds with its standard error, and the standard deviation."""
    place, count, unit = {"strength": strength}, len(values), _UNITS[quantity]
    deviation = float(values.std(ddof=1)) if count > 1 else None
    error = None if deviation is None else deviation / count**0.5
    points = [Point(f"{quantity}_mean", float(values.mean()), unit, place, error, count)]
    return (
        points
        if deviation is None
        else [*points, Point(f"{quantity}_sd", deviation, unit, place, None, count)]
    )
