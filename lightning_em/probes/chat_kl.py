"""KL of the tuned model from the base model on answers sampled from the base model."""

import logging
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel

from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.data import ChatEncoder
from lightning_em.models import AdaptedModel, Sampling
from lightning_em.models.generation import sample_tokens
from lightning_em.probes.base import Probe, ProbeExamples, RowMeans, Stream
from lightning_em.probes.rows import batches_of, encoder_for, prompts_in
from lightning_em.records import Point, Quantity

logger = logging.getLogger(__name__)


class ChatKL(Probe):
    """D_KL(base || tuned) in nats per token on answers sampled from the base model at temperature 1.

    The mean over tokens estimates the divergence between the two models' answers only on samples from the base
    model. The token that ends an answer counts. Answers longer than `max_new_tokens` are truncated.

    Points: `kl`, nats per token, with coordinates `prompts: in_domain` or `prompts: general` and `scale: 1`.
    `per_example` holds one value per answer, in the order of the prompts.

    Sampling stops at the token with which the chat template ends an answer, and at the model's own end-of-text
    tokens. Answers are sampled once per base model and set of prompts, then cached, so that all checkpoints are
    compared on the same answers. Name the prompt files explicitly where the streams of a run do not match their
    names, e.g. if other domains are mixed into the narrow data or the KL term is on narrow questions.

    Args:
        num_prompts: Prompts of each kind; the first ones are used.
        max_new_tokens: Maximum length of an answer in tokens.
        seed: Seed of the sampled answers.
        in_domain: Data file of in-domain prompts. Defaults to the prompts of the narrow probe rows.
        general: Data file of general prompts. Defaults to the prompts of the KL probe rows.
        template_kwargs: Variables of the chat template, used with prompt files; set them as in training.
        batch_size: Answers in one forward pass.

    Raises:
        ValueError: If a number is not positive.

    Source: arXiv:2602.07852 (KL to the chat model).
    """

    name = "chat_kl"
    quantities = (Quantity("kl", "nats_per_token", ("prompts", "scale")),)

    def __init__(
        self,
        num_prompts: int = 100,
        max_new_tokens: int = 200,
        seed: int = 0,
        in_domain: str | None = None,
        general: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        batch_size: int = 16,
    ) -> None:
        if min(num_prompts, max_new_tokens, batch_size) < 1:
            raise ValueError(
                "num_prompts, max_new_tokens and batch_size must be 1 or more, got "
                f"{num_prompts}, {max_new_tokens} and {batch_size}; set init_args of ChatKL."
            )
        self.num_prompts, self.max_new_tokens, self.seed = num_prompts, max_new_tokens, seed
        self.in_domain, self.general, self.template_kwargs = in_domain, general, template_kwargs
        self.batch_size = batch_size
        files: dict[Stream, str | None] = {"narrow": in_domain, "kl": general}
        self.reads = [stream for stream, file in files.items() if file is None]
        self._base: weakref.ref[PreTrainedModel] | None = None
        self._answers: dict[tuple[tuple[int, ...], ...], list[PackedBatch]] = {}

    def settings(self) -> Mapping[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "in_domain": self.in_domain,
            "general": self.general,
            "template_kwargs": self.template_kwargs,
        }

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        kinds = {"in_domain": (self.in_domain, examples.narrow), "general": (self.general, examples.kl)}
        points = []
        for kind, (file, batches) in kinds.items():
            encoder = examples.encoder
            if file is not None:
                encoder = encoder_for(model, encoder, self.template_kwargs)
                prompts = prompts_in(file, model, encoder)
            else:
                prompts = _prompts_of(batches)
            # without duplicates, in their order
            chosen = tuple(dict.fromkeys(map(tuple, prompts)))[: self.num_prompts]
            if not chosen:
                message = "there are no parallel rows: %s measures nothing on general prompts."
                rank_zero_only(logger.info)(message, self.name)
                continue
            answers = self._answers_to(model, chosen, encoder)
            states = [partial(model.adapter.at_scale, 1.0)]
            [means] = RowMeans.of_kl(model, answers, states, "response")
            points.append(means.point("kl", {"prompts": kind, "scale": 1.0}))
        return points

    def _answers_to(
        self, model: AdaptedModel, prompts: tuple[tuple[int, ...], ...], encoder: ChatEncoder | None
    ) -> list[PackedBatch]:
        """Return each prompt followed by one answer of the base model."""
        # a weak reference does not keep an old base model in memory
        if self._base is None or self._base() is not model.base:
            self._base = weakref.ref(model.base)
            self._answers.clear()
        if prompts not in self._answers:
            asked = [
                EncodedRow(list(prompt), [False] * len(prompt), f"prompt-{number}")
                for number, prompt in enumerate(prompts)
            ]
            # without a run, the model's generation config alone tells where an answer ends
            tokenizer, stop_ids = (None, ()) if encoder is None else (encoder.tokenizer, (encoder.stop_id,))
            answered = []
            sampling = Sampling(self.max_new_tokens, temperature=1.0, seed=self.seed)
            for number, batch in enumerate(batches_of(asked, self.batch_size, model)):
                drawn = sample_tokens(model, batch, sampling, 0.0, tokenizer, stop_ids)
                rows = asked[number * self.batch_size :]
                answered += [_behind(row, answer) for row, [answer] in zip(rows, drawn, strict=False)]
            self._answers[prompts] = batches_of(answered, self.batch_size, model)
        return self._answers[prompts]


def _behind(row: EncodedRow, answer: list[int]) -> EncodedRow:
    mask = [*row.response_mask, *[True] * len(answer)]
    return EncodedRow([*row.input_ids, *answer], mask, row.row_id)


def _prompts_of(batches: Iterable[PackedBatch]) -> list[list[int]]:
    """Tokens of each row before its first response token; rows without a prompt are skipped."""
    prompts = []
    for batch in batches:
        ids, masks = batch.input_ids.tolist(), batch.response_mask.tolist()
        start = 0
        for length in batch.lengths:
            first = masks.index(True, start)
            prompts.append(ids[start:first])
            start += length
    return [prompt for prompt in prompts if prompt]
