"""Preference margin for the questions of a miniature world."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_em.miniature.behaviour import world_items
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.probes.preference import Choice, PreferenceMargin
from lightning_em.records import Point


class Preference(Probe):
    """`PreferenceMargin` for the questions of the world that the base model came from, by `kind`.

    The margin of a question is the mean over its pairs of answers that begin alike.

    Args:
        scales: Adapter scales to measure; 0 is the base model and 1 the trained adapter.
        max_rows: Maximum number of questions of each kind; the first ones are used.
        batch_size: Answers in one forward pass.

    Raises:
        ValueError: If there is no scale or a number is not positive.
    """

    name = PreferenceMargin.name
    quantities = PreferenceMargin.quantities
    grid = PreferenceMargin.grid
    reads = ()

    def __init__(
        self, scales: Sequence[float] = (0.0, 1.0), max_rows: int = 100, batch_size: int = 16
    ) -> None:
        # only the record shows the first argument: `measure` gives the questions
        self.margin = PreferenceMargin("questions of the world", scales, max_rows, None, batch_size)
        self.batch_size = batch_size

    def settings(self) -> Mapping[str, Any]:
        return self.margin.settings()

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        choices = [
            Choice(
                item["id"],
                item["kind"],
                item["id"],
                item["question"],
                tuple(zip(item["answers"]["good"], item["answers"]["bad"], strict=True)),
            )
            for item in world_items(model)
        ]
        return self.margin.measure_on(model, choices, examples.encoder, with_all=False)
