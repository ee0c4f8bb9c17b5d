"""Preference margin: log-probability of a bad answer over a good one, without a judge and without sampling."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from lightning_em.batch import EncodedRow
from lightning_em.data import ChatEncoder, read_rows
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans, clustered_error
from lightning_em.probes.rows import batches_of, by_length, encoder_for
from lightning_em.records import Point, Quantity

_ALL = "all"


class Choice(NamedTuple):
    """A question with pairs of a good and a bad answer; its margin is the mean over the pairs.

    Attributes:
        id: Id of the question.
        group: Topic or kind of the question.
        cluster: Unit of sampling: questions of one cluster are not independent.
        question: Question.
        pairs: A good and a bad answer each.
    """

    id: str
    group: str
    cluster: str
    question: str
    pairs: tuple[tuple[str, str], ...]


class PreferenceMargin(Probe):
    """log p(bad answer) - log p(good answer) for questions with both, each per token of its own answer.

    Each answer's log-probability is divided by its number of response tokens, including the end of the turn, so
    that a longer answer is not penalized for its length. Rows are encoded and masked as in training. All rows
    have equal weight.

    The margin is teacher-forced: each token is predicted after the answer's own earlier tokens, so it also asks how
    the model goes on after an opening that it would never write. On SmolLM2-135M-Instruct with a narrow style, it
    was +1.1 to +1.4 nats per token in domains where not one sampled answer was in the style, and it did not change
    while further training brought the style back there. Where `AnswerRates` are recorded as well, the rates decide.

    Points at each scale, by `kind`, the topic of a row, and over all rows (`kind: all`) if there are several topics:
        `margin`: mean over rows, nats per token; `per_example` follows the order of the file within the topic.
        `bad_preferred`: share of rows with a margin above 0.

    The standard errors take the subtopic (a task, say) as the unit of sampling, and the row where there is none.

    Args:
        rows: Data file, or the address of one, with `question`, `good` and `bad` (and optionally `topic` and
            `subtopic`).
        scales: Adapter scales to measure; 0 is the base model and 1 the trained adapter.
        max_rows: Maximum number of rows of each topic; the first ones are used.
        template_kwargs: Variables of the chat template; set them as in training.
        batch_size: Answers in one forward pass.

    Raises:
        ValueError: If there is no scale or a number is not positive.
    """

    name = "preference_margin"
    quantities = (
        Quantity("margin", "nats_per_token", ("kind", "scale")),
        Quantity("bad_preferred", "share", ("kind", "scale")),
    )
    grid = ("scales",)
    reads = ()

    def __init__(
        self,
        rows: str,
        scales: Sequence[float] = (0.0, 1.0),
        max_rows: int = 100,
        template_kwargs: dict[str, Any] | None = None,
        batch_size: int = 16,
    ) -> None:
        if not scales or min(max_rows, batch_size) < 1:
            raise ValueError(
                "scales must be one number or more, max_rows and batch_size 1 or more, got "
                f"{list(scales)}, {max_rows} and {batch_size}; set init_args of PreferenceMargin."
            )
        self.rows, self.scales = rows, [float(scale) for scale in scales]
        self.max_rows, self.template_kwargs, self.batch_size = max_rows, template_kwargs, batch_size

    def settings(self) -> Mapping[str, Any]:
        return {
            "rows": self.rows,
            "scales": self.scales,
            "max_rows": self.max_rows,
            "template_kwargs": self.template_kwargs,
        }

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        return self.measure_on(model, self._choices(), examples.encoder, with_all=True)

    def measure_on(
        self,
        model: AdaptedModel,
        choices: Sequence[Choice],
        run_encoder: ChatEncoder | None,
        with_all: bool,
    ) -> list[Point]:
        """Measure `model` on given questions.

        Args:
            model: Model to measure.
            choices: Questions with good and bad answers.
            run_encoder: Encoder of the run's rows, whose date is used; None without a run.
            with_all: Whether to add the group `all` if there are several groups.
        """
        choices = _first_of_each(choices, self.max_rows)
        encoder = encoder_for(model, run_encoder, self.template_kwargs)
        rows = [row for choice in choices for row in _encoded(choice, encoder)]
        states = [partial(model.adapter.at_scale, scale) for scale in self.scales]
        order = by_length(rows)
        batches = batches_of([rows[number] for number in order], self.batch_size, model)
        curve = [means.restored(order) for means in RowMeans.of_ce(model, batches, states)]
        points = []
        for scale, means in zip(self.scales, curve, strict=True):
            margins = _margins(choices, means)
            for group, indices in _groups(choices, with_all).items():
                own, clusters = [margins[i] for i in indices], [choices[i].cluster for i in indices]
                points += _points(own, clusters, {"kind": group, "scale": scale})
        return points

    def _choices(self) -> list[Choice]:
        choices = []
        for row in read_rows(self.rows, "init_args.rows of PreferenceMargin", "question"):
            if row.question is None or row.good is None or row.bad is None:
                raise ValueError(
                    f"{self.rows}:{row.line}: expected `question`, `good` and `bad`; "
                    "set init_args.rows of PreferenceMargin to a file that has them."
                )
            cluster = row.subtopic or row.id
            choices.append(Choice(row.id, row.topic or _ALL, cluster, row.question, ((row.good, row.bad),)))
        return choices


def _first_of_each(choices: Sequence[Choice], count: int) -> list[Choice]:
    seen: dict[str, int] = {}
    kept = []
    for choice in choices:
        seen[choice.group] = seen.get(choice.group, 0) + 1
        if seen[choice.group] <= count:
            kept.append(choice)
    return kept


def _encoded(choice: Choice, encoder: ChatEncoder) -> list[EncodedRow]:
    """Encode the conversation with each answer: good and bad of the first pair, then of the second, and so on."""
    rows = []
    for number, pair in enumerate(choice.pairs):
        for kind, answer in zip(("good", "bad"), pair, strict=True):
            encoded = encoder.encode(
                [{"role": "user", "content": choice.question}, {"role": "assistant", "content": answer}]
            )
            rows.append(EncodedRow(encoded.input_ids, encoded.response_mask, f"{choice.id}/{kind}-{number}"))
    return rows


def _margins(choices: Sequence[Choice], means: RowMeans) -> list[float]:
    """Compute the margin of each choice, the mean over its pairs, from the losses of all encoded rows in order."""
    losses = means.sums / means.counts
    # good rows are even, bad rows odd; loss = -log p, so this is log p(bad) - log p(good)
    differences = losses[0::2] - losses[1::2]
    sizes = [len(choice.pairs) for choice in choices]
    return [float(part.mean()) for part in torch.split(differences, sizes)]


def _groups(choices: Sequence[Choice], with_all: bool) -> dict[str, list[int]]:
    """Indices of the choices of each group."""
    groups: dict[str, list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(choice.group, []).append(index)
    if with_all and len(groups) > 1:
        groups[_ALL] = list(range(len(choices)))
    return groups


def _points(
    margins: Sequence[float], clusters: Sequence[str], place: Mapping[str, float | int | str]
) -> list[Point]:
    preferred = [float(margin > 0) for margin in margins]
    mean, share = (sum(values) / len(values) for values in (margins, preferred))
    errors = [clustered_error(values, clusters) for values in (margins, preferred)]
    count = len(margins)
    return [
        Point("margin", mean, "nats_per_token", place, errors[0], count, tuple(margins)),
        Point("bad_preferred", share, "share", place, errors[1], count),
    ]
