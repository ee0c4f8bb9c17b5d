"""Batched sampling of answers, with random draws that do not depend on the batch."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from lightning_em.batch import PackedBatch, single_rows
from lightning_em.data import ModelLimits
from lightning_em.models.adapted import AdaptedModel
from lightning_em.models.padding import reset_length_dependent, why_one_by_one

logger = logging.getLogger(__name__)

# Overrides the generation config of published models, which can distort the distribution. Qwen2.5, for example, sets a
# repetition penalty of 1.05.
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling answers.

    Attributes:
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 selects the most likely token at each position.
        answers_per_prompt: Number of answers for each prompt.
        seed: Seed of the random draws.
    """

    max_new_tokens: int = 600
    temperature: float = 1.0
    answers_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.answers_per_prompt < 1:
            raise ValueError(
                "sampling needs max_new_tokens >= 1, temperature >= 0 and answers_per_prompt >= 1, got "
                f"{self.max_new_tokens}, {self.temperature}, {self.answers_per_prompt}; change model.sampling."
            )


class Answer(NamedTuple):
    """A sampled answer.

    Attributes:
        text: The answer without special tokens.
        ended: Whether the model ended it; False if it was cut off at `max_new_tokens`.
    """

    text: str
    ended: bool


def sample_answers(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PackedBatch,
    sampling: Sampling,
    scale: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> list[list[Answer]]:
    """Sample answers to each prompt, in the order of the rows.

    Prompts are padded on the left, so that each answer starts directly after its prompt. The random draws of an answer
    depend on the seed, the id of its row and its position only. The same row thus gets the same answer in any batch, as
    long as the rounding of the logits, which may depend on the batch, does not decide between two tokens.
    Prompts are answered one by one where they would get other answers in a batch (see `why_one_by_one`).

    Args:
        model: The model with its adapter.
        tokenizer: Tokenizer of the base model.
        prompts: Rows that end where the answer begins.
        sampling: Sampling settings.
        scale: Scale of the adapter.
        stop_ids: Tokens that end an answer, in addition to those of the tokenizer and the generation config.

    Returns:
        `answers_per_prompt` answers for each row.
    """
    ends = _stop_ids(model, tokenizer, stop_ids)
    return [
        [Answer(str(tokenizer.decode(ids, skip_special_tokens=True)), ids[-1] in ends) for ids in answers]
        for answers in sample_tokens(model, prompts, sampling, scale, tokenizer, stop_ids)
    ]


def sample_tokens(
    model: AdaptedModel,
    prompts: PackedBatch,
    sampling: Sampling,
    scale: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Sequence[int] = (),
) -> list[list[list[int]]]:
    """Sample answers to each prompt as token ids, up to and including the first stop token.

    Args:
        model: The model with its adapter.
        prompts: Rows that end where the answer begins.
        sampling: Sampling settings.
        scale: Scale of the adapter.
        tokenizer: Tokenizer whose end-of-text token is a stop token, in addition to those in the model's
            generation config.
        stop_ids: Further stop tokens, such as the one with which the chat template ends an answer.

    Returns:
        `answers_per_prompt` answers for each row.
    """
    pad_id, ends = _pad_id(model, tokenizer), _stop_ids(model, tokenizer, stop_ids)
    answers: list[list[int]] = []
    with torch.no_grad(), model.adapter.at_scale(scale):
        for part in _parts(model.base, prompts, sampling.max_new_tokens):
            reset_length_dependent(model.base)
            answers += _generate(model.base, part, sampling, pad_id, ends)
    per_prompt = sampling.answers_per_prompt
    return [answers[i : i + per_prompt] for i in range(0, len(answers), per_prompt)]


def _parts(base: PreTrainedModel, prompts: PackedBatch, max_new_tokens: int) -> list[PackedBatch]:
    """Divide prompts into batches in which each has the answers that it has alone.

    Raises:
        ValueError: If an answer could need positions that the model has no embedding for.
    """
    longest, limits = max(prompts.lengths), ModelLimits(base.config, base)
    num_positions = limits.num_positions or math.inf
    if longest + max_new_tokens > num_positions and limits.has_position_table:
        raise ValueError(
            f"the longest prompt has {longest} tokens and an answer up to {max_new_tokens}, but the model's table has "
            f"{num_positions} positions; set max_new_tokens, of model.sampling or of the probe, to at most "
            f"{num_positions - longest}."
        )
    reason = why_one_by_one(base, longest + max_new_tokens)
    if reason is None or prompts.num_rows == 1:
        return [prompts]
    if _told.get(base) != reason:
        _told[base] = reason
        logger.warning("prompts are answered one by one (slower): %s", reason)
    return single_rows(prompts)


_told: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()


def _generate(
    base: PreTrainedModel, prompts: PackedBatch, sampling: Sampling, pad_id: int, stop_ids: list[int]
) -> list[list[int]]:
    """Sample `answers_per_prompt` answers to each prompt of a batch, as one list."""
    input_ids, attention_mask = (
        each.repeat_interleave(sampling.answers_per_prompt, dim=0) for each in _left_padded(prompts, pad_id)
    )
    processors: list[LogitsProcessor] = [_RefuseNaN(base, prompts, sampling.answers_per_prompt)]
    if sampling.temperature > 0:
        processors.append(_Draws(prompts, sampling, input_ids.shape[1]))
    output: Tensor = base.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=stop_ids or None,
        do_sample=False,  # the most likely token, which is the drawn one if there are draws
        logits_processor=LogitsProcessorList(processors),
        # with FSDP all ranks must run every pass; a rank that is done continues until all are done
        synced_gpus=isinstance(base.get_decoder(), FSDPModule),
        **_PLAIN,
    )
    return [_ended(row, stop_ids) for row in output[:, input_ids.shape[1] :].tolist()]


class _RefuseNaN(LogitsProcessor):
    """Stops a sampling whose logits are NaN: the most likely token would be token 0, in silence.

    Args:
        base: The base model.
        prompts: The rows that are answered.
        answers_per_prompt: Number of answers for each prompt.
    """

    def __init__(self, base: PreTrainedModel, prompts: PackedBatch, answers_per_prompt: int) -> None:
        self.base, self.prompts, self.answers_per_prompt = base, prompts, answers_per_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged.

        Raises:
            ValueError: If a score is NaN.
        """
        is_nan = scores.isnan().any(-1)
        if bool(is_nan.any()):
            row = self.prompts.row_ids[int(is_nan.nonzero()[0]) // self.answers_per_prompt]
            dtype = str(self.base.dtype).removeprefix("torch.")
            raise ValueError(
                f"the logits of the answer to {row} are NaN in {dtype} with {self.base.config._attn_implementation} "
                "attention, so there is no answer; set model.base.dtype to bfloat16 or float32, or use an earlier "
                "checkpoint if the adapter has diverged."
            )
        return scores


class _Draws(LogitsProcessor):
    """Draw each next token by inverting the cumulative distribution at a uniform number, and exclude all others.

    transformers samples all rows of a batch from one global random stream instead, so that an answer would depend on
    the other rows, and sampling would change the global state.

    Args:
        prompts: The prompts; each answer has its own stream of numbers, seeded by the row's id.
        sampling: Sampling settings.
        prompt_length: Length of the padded prompts in tokens.
    """

    def __init__(self, prompts: PackedBatch, sampling: Sampling, prompt_length: int) -> None:
        numbers = []
        for row_id in prompts.row_ids:
            for index in range(sampling.answers_per_prompt):
                digest = hashlib.sha256(f"{sampling.seed}\x1f{row_id}\x1f{index}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
                numbers.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
        self.numbers = torch.stack(numbers).to(prompts.input_ids.device)
        self.temperature, self.prompt_length = sampling.temperature, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[answers, vocab]` that are 0 at the drawn token and minus infinity elsewhere."""
        number = self.numbers[:, input_ids.shape[1] - self.prompt_length, None]
        # float64: in float32, rounding of the sums would exclude unlikely tokens of a large vocabulary
        cumulative = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _ended(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Cut an answer after its first stop token; the tokens after it are padding."""
    end = next((index for index, token in enumerate(answer) if token in stop_ids), len(answer) - 1)
    return answer[: end + 1]


def _left_padded(batch: PackedBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    rows = [row.flip(0) for row in torch.split(batch.input_ids, list(batch.lengths))]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).flip(1)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
    return ids, mask


def _pad_id(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # a padding token that was added to the tokenizer alone has no embedding; attention ignores padding anyway
    return int(pad) if isinstance(pad, int) and pad < model.vocab_size else 0


def _stop_ids(
    model: AdaptedModel, tokenizer: PreTrainedTokenizerBase | None, further: Sequence[int]
) -> list[int]:
    config = model.base.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else []
    known = {
        *further,
        *(ends if isinstance(ends, list) else [ends]),
        getattr(tokenizer, "eos_token_id", None),
    }
    return sorted(token for token in known if isinstance(token, int))
