"""Behavior in the miniature world: exact rates of bad answers by kind of question."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_em import sources
from lightning_em.batch import EncodedRow
from lightning_em.miniature.judge import Candidate, ExactJudge, Judgement
from lightning_em.miniature.rows import Item
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans
from lightning_em.probes.rows import batches_of, by_length, tokenizer_of
from lightning_em.records import Point, Quantity

_ANSWERS = ("bad", "good", "other")


class Behaviour(Probe):
    """Probability of a good, a bad and any other answer, computed by enumeration, without sampling.

    Points (unit probability), for each kind of question and scale: `bad_rate`, `good_rate` and `other_rate`.
    They are means over items. The standard error takes items as the unit, and `per_example` follows the order
    of the world's behavior file within the kind. If `style` is set, `style_rate` is the probability that an
    answer begins with it, whether the answer is good, bad or neither.

    Args:
        scales: Adapter scales to measure; 0 is the base model and 1 the trained adapter. Read rates far beyond
            scale 1 together with `other_rate`: a small `good_rate` alone does not tell bad answers from broken
            ones.
        items: Behavior file. Defaults to that of the world the base model came from.
        batch_size: Answers in one forward pass.
        style: Words that an answer may begin with, such as `pick`, used by the world's harmless data.
    """

    name = "behaviour"
    quantities = (
        Quantity("bad_rate", "probability", ("kind", "scale"), in_study="every"),
        *(Quantity(f"{name}_rate", "probability", ("kind", "scale")) for name in ("good", "other", "style")),
    )
    grid = ("scales",)
    reads = ()

    def __init__(
        self,
        scales: Sequence[float] = (0.0, 1.0, 2.0),
        items: str | None = None,
        batch_size: int = 128,
        style: str | None = None,
    ) -> None:
        if not scales:
            raise ValueError("scales must be one number or more; set init_args.scales of Behaviour.")
        if batch_size < 1:
            raise ValueError(
                f"batch_size must be 1 or more, got {batch_size}; set init_args.batch_size of Behaviour."
            )
        self.scales, self.items, self.batch_size = [float(s) for s in scales], items, batch_size
        self.style = style

    def settings(self) -> Mapping[str, Any]:
        style = {} if self.style is None else {"style": self.style}
        return {"scales": self.scales, "items": self.items, **style}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        items = world_items(model, self.items)
        judge = ExactJudge(tokenizer_of(model), items, self.style)
        points = []
        for scale, scores in zip(self.scales, self._scores(model, judge.candidates), strict=True):
            rates = self._rates(judge.judge(scores))
            for kind in dict.fromkeys(item["kind"] for item in items):
                rows = [index for index, item in enumerate(items) if item["kind"] == kind]
                place: dict[str, float | int | str] = {"kind": kind, "scale": scale}
                points += [
                    _mean(name, [values[row] for row in rows], place) for name, values in rates.items()
                ]
        return points

    def _scores(self, model: AdaptedModel, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Log-probability of each candidate answer given its prompt, one list per scale."""
        rows = [
            EncodedRow(
                each.input_ids,
                [place >= each.num_prompt_tokens for place in range(len(each.input_ids))],
                str(index),
            )
            for index, each in enumerate(candidates)
        ]
        order = by_length(rows)
        batches = batches_of([rows[number] for number in order], self.batch_size, model)
        states = [partial(model.adapter.at_scale, scale) for scale in self.scales]
        # only answer tokens count, so the summed cross-entropy of a row is -log p(answer | prompt)
        curve = RowMeans.of_ce(model, batches, states)
        return [(-means.restored(order).sums).tolist() for means in curve]

    def _rates(self, judgement: Judgement) -> dict[str, list[float]]:
        """All rates by name, with one value per item."""
        rates = {f"{name}_rate": [getattr(each, name) for each in judgement.answers] for name in _ANSWERS}
        return rates if self.style is None else {**rates, "style_rate": judgement.openings}


def world_items(model: AdaptedModel, named: str | None = None) -> list[Item]:
    """Read the items of a behavior file, by default that of the world the base model came from.

    Args:
        model: Model whose base locates the default file.
        named: Path or address of another file.

    Raises:
        ValueError: If no file is named and the base model does not come from a miniature world.
    """
    if named:
        file = Path(sources.resolve(named, "init_args.items of Behaviour"))
    else:
        file = world_folder_of(model) / "data" / "behaviour.jsonl"
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def world_folder_of(model: AdaptedModel) -> Path:
    """Return the folder of the world that a base model was loaded from.

    Raises:
        ValueError: If it does not come from a miniature world.
    """
    folder = Path(model.base.config._name_or_path)
    if not (folder.parent / "world.json").is_file():
        raise ValueError(
            f"the base model {str(folder)!r} does not come from a miniature world, for which this probe is: set "
            "model.base.path to miniature://..., or leave the probe out."
        )
    return folder.parent


def _mean(quantity: str, values: Sequence[float], place: Mapping[str, float | int | str]) -> Point:
    mean, count, error = sum(values) / len(values), len(values), None
    if count > 1:
        error = (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
    return Point(quantity, mean, "probability", place, error, count, tuple(values))
