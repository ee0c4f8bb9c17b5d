"""Rates of sampled answers that rules recognize, and how likely an answer begins in a given way; no judge."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import groupby, permutations, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from lightning_em.batch import EncodedRow
from lightning_em.data import ChatEncoder, Row, scan_rows
from lightning_em.data.encoding import encode_prompts
from lightning_em.manifest import write_atomically
from lightning_em.models import AdaptedModel, Sampling
from lightning_em.models.generation import Answer, sample_answers
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans, clustered_error
from lightning_em.probes.rows import batches_of, by_length, encoder_for
from lightning_em.records import Point, Quantity
from lightning_em.runs import RunFolder

Rule = Callable[[str], bool]
_ALL = "all"
_OPENING = "opening_probability"


class SampledAnswer(NamedTuple):
    """One sampled answer.

    Attributes:
        row: The question.
        scale: Scale of the adapter.
        text: The answer without special tokens. An answer that was cut at `max_new_tokens` ends in an ellipsis.
    """

    row: Row
    scale: float
    text: str


class AnswerRates(Probe):
    """Share of sampled answers for which a rule holds, by topic of the question.

    Points for each scale and topic:
        `<rule>_rate`: share of answers for which the rule holds; `per_example` has 1 or 0 for each answer.
        `opening_probability`, with `openings`: probability that an answer begins with one of them; `per_example` has
            that of each question. It is the sum over openings of the product of the probabilities of their tokens
            at temperature 1, as the tokenizer splits them; the same text in other tokens is not counted. It needs
            no sampling, and is not zero where no sampled answer begins so.

    `per_example` follows the order of the file within the topic. The standard errors take the subtopic (a task, say) as
    the unit of sampling, since questions about one task are not independent.

    The answers, with their questions and what each rule says, are stored in `behaviour/answer_rates-step-N.jsonl` in
    the run's folder.

    Args:
        questions: Data file with `question`, and optionally `topic` and `subtopic`. Answers in it are ignored.
        rules: Functions by name that take the text of an answer and return whether the rule holds. A text that was
            cut at `max_new_tokens` ends in an ellipsis.
        scales: Adapter scales; 0 is the base model and 1 the trained adapter.
        topics: Topics to ask about; all by default.
        max_questions: Maximum number of questions of each topic, evenly spaced over the file; all by default.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature.
        seed: Seed of the answers.
        batch_size: Answers that are sampled together; an answer does not depend on the others.
        template_kwargs: Variables of the chat template; set them as in training.
        openings: First words of answers, none of which begins with another.

    Raises:
        ValueError: If there is no scale or no rule, if a number is not positive, or if one opening begins with another.
    """

    name = "answer_rates"
    grid = ("scales", "topics")
    reads = ()

    def __init__(
        self,
        questions: str,
        rules: dict[str, Rule],
        scales: Sequence[float] = (0.0, 1.0),
        topics: list[str] | None = None,
        max_questions: int | None = None,
        max_new_tokens: int = 40,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 48,
        template_kwargs: dict[str, Any] | None = None,
        openings: Sequence[str] = (),
    ) -> None:
        if not scales or not rules or min(batch_size, max_new_tokens, max_questions or 1) < 1:
            raise ValueError(
                "AnswerRates needs one scale or more, one rule or more, and positive numbers, got scales "
                f"{list(scales)}, rules {sorted(rules)}, max_questions {max_questions}, max_new_tokens "
                f"{max_new_tokens} and batch_size {batch_size}; set its init_args."
            )
        for shorter, longer in permutations(openings, 2):
            if longer.startswith(shorter):
                raise ValueError(
                    f"answers that begin with {longer!r} also begin with {shorter!r} and would count twice; leave "
                    "the longer one out of init_args.openings of AnswerRates."
                )
        self.questions, self.rules, self.scales = questions, dict(rules), [float(scale) for scale in scales]
        self.topics, self.max_questions, self.max_new_tokens = topics, max_questions, max_new_tokens
        self.temperature, self.seed, self.batch_size = temperature, seed, batch_size
        self.template_kwargs, self.openings = template_kwargs, list(openings)
        self.quantities = [
            Quantity(f"{name}_rate", "share", ("topic", "scale"), in_study="every") for name in rules
        ]
        if self.openings:
            self.quantities.append(Quantity(_OPENING, "probability", ("topic", "scale"), in_study="every"))
        self._answers_file: Path | None = None

    def settings(self) -> Mapping[str, Any]:
        return {
            "questions": self.questions,
            "rules": {name: f"{rule.__module__}.{rule.__qualname__}" for name, rule in self.rules.items()},
            "scales": self.scales,
            "topics": self.topics,
            "max_questions": self.max_questions,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "template_kwargs": self.template_kwargs,
            "openings": self.openings,
        }

    def for_checkpoint(self, run: RunFolder, step: int) -> "AnswerRates":
        probe = copy(self)
        probe._answers_file = run.path / "behaviour" / f"{self.name}-step-{step:06d}.jsonl"
        return probe

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        rows, encoder = self._rows(), encoder_for(model, examples.encoder, self.template_kwargs)
        answers = self._sampled(model, rows, encoder)
        self._store([answer for of_scale in answers for answer in of_scale])
        values: list[dict[str, list[float]]] = [
            {f"{name}_rate": [float(rule(each.text)) for each in told] for name, rule in self.rules.items()}
            for told in answers
        ]
        if self.openings:
            likely = self._opening_probabilities(model, rows, encoder)
            values = [rates | {_OPENING: each} for rates, each in zip(values, likely, strict=True)]
        points = []
        for scale, at_scale in zip(self.scales, values, strict=True):
            for topic, group in groupby(range(len(rows)), key=lambda index: rows[index].topic or _ALL):
                indices = list(group)
                clusters = [rows[index].subtopic or rows[index].id for index in indices]
                for quantity, of_rows in at_scale.items():
                    own = [of_rows[index] for index in indices]
                    unit = "probability" if quantity == _OPENING else "share"
                    coordinates = {"topic": topic, "scale": scale}
                    error = clustered_error(own, clusters)
                    points.append(
                        Point(quantity, sum(own) / len(own), unit, coordinates, error, len(own), tuple(own))
                    )
        return points

    def _sampled(
        self, model: AdaptedModel, rows: Sequence[Row], encoder: ChatEncoder
    ) -> list[list[SampledAnswer]]:
        """One answer to each question at each scale."""
        prompts = encode_prompts(rows, encoder)
        order = by_length(prompts)
        batches = batches_of([prompts[index] for index in order], self.batch_size, model)
        sampling = Sampling(self.max_new_tokens, self.temperature, seed=self.seed)
        answers = []
        for scale in self.scales:
            drawn = [
                each
                for batch in batches
                for [each] in sample_answers(
                    model, encoder.tokenizer, batch, sampling, scale, [encoder.stop_id]
                )
            ]
            texts = dict(zip(order, (_with_ellipsis(each) for each in drawn), strict=True))
            answers.append([SampledAnswer(row, scale, texts[index]) for index, row in enumerate(rows)])
        return answers

    def _opening_probabilities(
        self, model: AdaptedModel, rows: Sequence[Row], encoder: ChatEncoder
    ) -> list[list[float]]:
        """Probability of an opening for each question at each scale."""
        encoded = [_encoded_opening(row, opening, encoder) for row in rows for opening in self.openings]
        order = by_length(encoded)
        batches = batches_of([encoded[index] for index in order], self.batch_size, model)
        states = [partial(model.adapter.at_scale, scale) for scale in self.scales]
        losses = [means.restored(order).sums for means in RowMeans.of_ce(model, batches, states)]
        return [(-sums).exp().view(len(rows), -1).sum(1).tolist() for sums in losses]

    def _rows(self) -> list[Row]:
        """The questions to ask, sorted by topic in the order in which topics first occur."""
        by_topic: dict[str, list[Row]] = {}
        for row in scan_rows(self.questions, questions_only=True).usable_rows():
            by_topic.setdefault(row.topic or _ALL, []).append(row)
        if unknown := [topic for topic in self.topics or () if topic not in by_topic]:
            raise ValueError(
                f"{self.questions} has no questions of topic {unknown}; it has {sorted(by_topic)}; set "
                "init_args.topics of AnswerRates."
            )
        chosen = []
        for topic in self.topics or by_topic:
            rows = by_topic[topic]
            count = min(self.max_questions or len(rows), len(rows))
            chosen += [rows[number * len(rows) // count] for number in range(count)]
        return chosen

    @rank_zero_only
    def _store(self, answers: Sequence[SampledAnswer]) -> None:
        if self._answers_file is None:
            return
        lines = [
            json.dumps(
                {
                    "id": each.row.id,
                    "topic": each.row.topic,
                    "subtopic": each.row.subtopic,
                    "question": each.row.prompt,
                    "scale": each.scale,
                    "answer": each.text,
                    **{name: rule(each.text) for name, rule in self.rules.items()},
                },
                ensure_ascii=False,
            )
            for each in answers
        ]
        self._answers_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._answers_file, "".join(f"{line}\n" for line in lines))


def _with_ellipsis(answer: Answer) -> str:
    text = answer.text.strip()
    return text if answer.ended else f"{text}\u2026"


def _encoded_opening(row: Row, opening: str, encoder: ChatEncoder) -> EncodedRow:
    """Encode the question and the opening; only the tokens of the opening are counted."""
    turns = list(takewhile(lambda turn: turn["role"] != "assistant", row.messages))
    question = turns or [{"role": "user", "content": row.question or ""}]
    ids, mask = encoder.encode([*question, {"role": "assistant", "content": opening}])
    # The encoder counts the tokens that end the turn, but the answer goes on after its opening.
    tokenizer = encoder.tokenizer
    while ids[-1] in tokenizer.added_tokens_decoder or ids[-1] in tokenizer.all_special_ids or not mask[-1]:
        ids, mask = ids[:-1], mask[:-1]
    return EncodedRow(ids, mask, f"{row.id}/{opening}")
