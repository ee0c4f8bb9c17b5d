"""Behaviour in the miniature world: exact rates of bad answers by kind of question."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lightning_em.miniature import resolve
from lightning_em.miniature.judge import answer_probabilities
from lightning_em.miniature.rows import Item
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.records import Point


class MiniatureBehaviour(Probe):
    """Probability of a good, a bad and any other answer, by enumeration, never by sampling.

    Points (unit probability), one a kind of question and scale: `bad_rate`, `good_rate`, `other_rate`,
    means over items, with the item as the unit of the standard error and `per_example` in the order of
    the world's behaviour file within that kind.

    Args:
        scales: Where to look; 0 is the base and 1 the trained adapter.
        items: Behaviour file; that of the world the base came from if not given.
        batch_size: Prompts in one forward pass.
    """

    name = "behaviour"

    def __init__(
        self, scales: Sequence[float] = (0.0, 1.0, 2.0), items: str | None = None, batch_size: int = 128
    ) -> None:
        if not scales:
            raise ValueError("scales must be one number or more; set init_args.scales of MiniatureBehaviour.")
        self.scales, self.items, self.batch_size = [float(s) for s in scales], items, batch_size

    def settings(self) -> Mapping[str, Any]:
        return {"scales": self.scales, "items": self.items}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        folder = Path(model.base.config._name_or_path)
        items = _read(Path(resolve(self.items)) if self.items else _beside(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        points = []
        for scale in self.scales:
            with model.adapter.at_scale(scale):
                rates = answer_probabilities(model.base, tokenizer, items, self.batch_size)
            for kind in dict.fromkeys(item["kind"] for item in items):
                rows = [row for row, item in zip(rates, items, strict=True) if item["kind"] == kind]
                place: dict[str, float | int | str] = {"kind": kind, "scale": scale}
                points += [
                    _mean(f"{name}_rate", [getattr(row, name) for row in rows], place)
                    for name in ("bad", "good", "other")
                ]
        return points


def _beside(model_folder: Path) -> Path:
    file = model_folder.parent / "data" / "behaviour.jsonl"
    if not file.is_file():
        raise ValueError(
            f"MiniatureBehaviour found no {file}: it works for models of a miniature world "
            "(model.base.path miniature://...); set its init_args.items for another place."
        )
    return file


def _read(file: Path) -> list[Item]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _mean(quantity: str, values: list[float], place: dict[str, float | int | str]) -> Point:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    error = (variance / len(values)) ** 0.5
    return Point(quantity, mean, "probability", place, error, len(values), tuple(values))
