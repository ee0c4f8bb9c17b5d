"""Pre-training significance: effect of a solution's direction on general text, against random directions."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_em.batch import EncodedRow
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import EFFECTIVE_NORM, Probe, ProbeExamples, RowMeans
from lightning_em.probes.rows import batches_of, by_length, texts_in, tokenizer_of
from lightning_em.records import Point, Quantity

logger = logging.getLogger(__name__)


class PretrainingSignificance(Probe):
    """D_KL(base || tuned) on general text against the norm of the update, with random updates as the control.

    A random update replaces every parameter tensor of the adapter by a random direction orthogonal to it. The
    update is scaled so that its effective norm is `norm_ratio` times the trained adapter's.

    Points, nats per token over all positions: `kl` with coordinates `norm_ratio`, `direction` (`adapter` or
    `random`) and `draw` (0 for the adapter, from 0 for random directions). `effective_norm` is the norm of the
    trained adapter. Adapters without an effective norm, or with norm 0, are skipped with a message.

    Args:
        text: JSONL file with `text` in each row, a text file of paragraphs, or the address of one of these.
        num_texts: Number of texts; the first ones are used.
        max_tokens: Maximum tokens of a text; longer texts are truncated.
        num_draws: Number of random directions.
        norm_ratios: Effective norms to measure, in units of the trained adapter's norm.
        seed: Seed of the random directions.
        batch_size: Texts in one forward pass.

    Raises:
        ValueError: If a number is out of range or there is no ratio.

    Source: arXiv:2602.07852 (pre-training significance).
    """

    name = "significance"
    quantities = (
        Quantity("kl", "nats_per_token", ("direction", "draw", "norm_ratio"), mean_over=("draw",)),
        EFFECTIVE_NORM,
    )
    grid = ("norm_ratios",)
    reads = ()

    def __init__(
        self,
        text: str,
        num_texts: int = 32,
        max_tokens: int = 128,
        num_draws: int = 5,
        norm_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        if min(num_texts, num_draws, batch_size) < 1 or max_tokens < 2 or seed < 0:
            raise ValueError(
                "num_texts, num_draws and batch_size must be 1 or more, max_tokens 2 or more and seed not "
                f"negative, got {num_texts}, {num_draws}, {batch_size}, {max_tokens} and {seed}; "
                "set init_args of PretrainingSignificance."
            )
        if not norm_ratios or not all(0 < ratio < float("inf") for ratio in norm_ratios):
            raise ValueError(
                f"norm_ratios must be positive numbers, one or more, got {list(norm_ratios)}; "
                "set init_args.norm_ratios of PretrainingSignificance."
            )
        self.text, self.num_texts, self.max_tokens, self.batch_size = text, num_texts, max_tokens, batch_size
        self.num_draws, self.seed = num_draws, seed
        self.norm_ratios = sorted({float(ratio) for ratio in norm_ratios})

    def settings(self) -> Mapping[str, Any]:
        return {
            "text": self.text,
            "num_texts": self.num_texts,
            "max_tokens": self.max_tokens,
            "num_draws": self.num_draws,
            "norm_ratios": self.norm_ratios,
            "seed": self.seed,
        }

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        return self.measure_on(model, self._texts)

    def measure_on(
        self, model: AdaptedModel, texts: Callable[[AdaptedModel], Sequence[Sequence[int]]]
    ) -> list[Point]:
        """Measure `model` on tokenized texts, of which at most `max_tokens` tokens are read.

        Args:
            model: Model to measure.
            texts: Function that returns the token ids of each text; not called if there is no norm to compare.
        """
        found = model.adapter.effective_norm()
        norm = 0.0 if found is None else found.item()
        if norm == 0:
            message = "%s has no effective norm%s: %s has nothing to compare."
            name = type(model.adapter).__name__
            rank_zero_only(logger.info)(message, name, " yet" if found is not None else "", self.name)
            return []
        grid = [("adapter", 0, ratio) for ratio in self.norm_ratios]
        grid += [("random", draw, ratio) for draw in range(self.num_draws) for ratio in self.norm_ratios]
        states = [
            partial(model.adapter.at_scale, ratio)
            if direction == "adapter"
            else partial(self._random, model, draw, ratio * norm)
            for direction, draw, ratio in grid
        ]
        points = [Point("effective_norm", norm, "norm")]
        tokens = [list(ids[: self.max_tokens]) for ids in texts(model)]
        rows = [EncodedRow(ids, [True] * len(ids), f"text-{number}") for number, ids in enumerate(tokens)]
        batches = batches_of([rows[number] for number in by_length(rows)], self.batch_size, model)
        curve = RowMeans.of_kl(model, batches, states, "all")
        for (direction, draw, ratio), means in zip(grid, curve, strict=True):
            place: dict[str, float | int | str] = {"direction": direction, "draw": draw, "norm_ratio": ratio}
            # `per_example` refers to the ids of probe rows, and these texts are not probe rows
            points.append(replace(means.point("kl", place), per_example=None))
        return points

    @contextmanager
    def _random(self, model: AdaptedModel, draw: int, norm: float) -> Iterator[None]:
        """Set a random update with this effective norm."""
        state = np.random.SeedSequence((self.seed, draw)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        # x' = sqrt(1 - e^2) x + e y at e = 1: only the orthogonal noise y is left
        with model.adapter.perturbed(1.0, generator):
            # each tensor keeps its norm under the noise, but their product, such as B A, does not: rescale
            own = model.adapter.effective_norm()
            assert own is not None
            with model.adapter.at_scale(norm / own.item()):
                yield

    def _texts(self, model: AdaptedModel) -> list[list[int]]:
        tokenizer = tokenizer_of(model)
        texts = texts_in(self.text, "init_args.text of PretrainingSignificance")[: self.num_texts]
        return [tokenizer(text)["input_ids"] for text in texts]
