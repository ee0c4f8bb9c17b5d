"""Rates of sampled answers that rules recognize: behavior without a judge."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_em.data import ChatEncoder, Row, scan_rows
from lightning_em.data.encoding import encode_prompts
from lightning_em.manifest import write_atomically
from lightning_em.models import AdaptedModel, Sampling
from lightning_em.models.generation import Answer, sample_answers
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.probes.rows import batches_of, by_length, encoder_for
from lightning_em.records import Point, Quantity
from lightning_em.runs import RunFolder

Rule = Callable[[str], bool]
_ALL = "all"


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

    Points for each rule, scale and topic: `<rule>_rate`, a share. `per_example` holds 1 or 0 per answer in the order
    of the file within the topic. The standard error takes the subtopic (a task, say) as the unit of sampling, since
    questions about one task are not independent.

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

    Raises:
        ValueError: If there is no scale or rule, or a number is not positive.
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
    ) -> None:
        if not scales or not rules or min(batch_size, max_new_tokens, max_questions or 1) < 1:
            raise ValueError(
                "AnswerRates needs one scale or more, one rule or more, and positive numbers, got scales "
                f"{list(scales)}, rules {sorted(rules)}, max_questions {max_questions}, max_new_tokens "
                f"{max_new_tokens} and batch_size {batch_size}; set its init_args."
            )
        self.questions, self.rules, self.scales = questions, dict(rules), [float(scale) for scale in scales]
        self.topics, self.max_questions, self.max_new_tokens = topics, max_questions, max_new_tokens
        self.temperature, self.seed, self.batch_size = temperature, seed, batch_size
        self.template_kwargs = template_kwargs
        self.quantities = [
            Quantity(f"{name}_rate", "share", ("topic", "scale"), in_study="every") for name in rules
        ]
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
        }

    def for_checkpoint(self, run: RunFolder, step: int) -> "AnswerRates":
        probe = copy(self)
        probe._answers_file = run.path / "behaviour" / f"{self.name}-step-{step:06d}.jsonl"
        return probe

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        answers = self._sampled(model, examples.encoder)
        self._store(answers)
        points = []
        for (scale, topic), group in groupby(answers, key=lambda each: (each.scale, each.row.topic or _ALL)):
            told = list(group)
            clusters = [each.row.subtopic or each.row.id for each in told]
            for name, rule in self.rules.items():
                held = [float(rule(each.text)) for each in told]
                points.append(
                    Point(
                        f"{name}_rate",
                        sum(held) / len(held),
                        "share",
                        {"topic": topic, "scale": scale},
                        clustered_error(held, clusters),
                        len(held),
                        tuple(held),
                    )
                )
        return points

    def _sampled(self, model: AdaptedModel, run_encoder: ChatEncoder | None) -> list[SampledAnswer]:
        """All answers, ordered by scale, then topic, then position in the file."""
        rows, encoder = self._rows(), encoder_for(model, run_encoder, self.template_kwargs)
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
            answers += [SampledAnswer(row, scale, texts[index]) for index, row in enumerate(rows)]
        return answers

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
