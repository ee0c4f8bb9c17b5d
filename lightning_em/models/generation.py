"""Batched sampling of answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_em.batch import PackedBatch
from lightning_em.models.adapted import AdaptedModel

# Overrides the generation config of published models, which can distort the distribution. Qwen2.5, for example, sets a
# repetition penalty of 1.05.
_PLAIN = {
    "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
}  # fmt: skip


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


def sample_answers(
    model: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PackedBatch,
    sampling: Sampling,
    scale: float = 1.0,
) -> list[list[str]]:
    """Sample answers to each prompt, in the order of the rows.

    Prompts are padded on the left, so that each answer starts directly after its prompt.

    Args:
        model: The model with its adapter.
        tokenizer: Tokenizer of the base model.
        prompts: Rows that end where the answer begins.
        sampling: Sampling settings.
        scale: Scale of the adapter.

    Returns:
        `answers_per_prompt` texts for each row.
    """
    answers = sample_tokens(model, prompts, sampling, scale, tokenizer)
    return [list(tokenizer.batch_decode(each, skip_special_tokens=True)) for each in answers]


def sample_tokens(
    model: AdaptedModel,
    prompts: PackedBatch,
    sampling: Sampling,
    scale: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[list[int]]]:
    """Sample answers to each prompt as token ids, up to and including the first stop token.

    Args:
        model: The model with its adapter.
        prompts: Rows that end where the answer begins.
        sampling: Sampling settings.
        scale: Scale of the adapter.
        tokenizer: Tokenizer whose end-of-text token is a stop token, in addition to those in the model's
            generation config.

    Returns:
        `answers_per_prompt` answers for each row.
    """
    pad_id, stop_ids = _pad_id(tokenizer), _stop_ids(model, tokenizer)
    input_ids, attention_mask = _left_padded(prompts, pad_id)
    drawing = {"do_sample": True, "temperature": sampling.temperature}
    own_device = [input_ids.device] if input_ids.is_cuda else []
    # transformers samples from the global generator; fork it, so that sampling does not change its state
    with torch.random.fork_rng(own_device), torch.no_grad(), model.adapter.at_scale(scale):
        torch.manual_seed(sampling.seed)
        output = model.base.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.answers_per_prompt,
            pad_token_id=pad_id,
            eos_token_id=stop_ids or None,
            # with FSDP all ranks must run every pass; a rank that is done continues until all are done
            synced_gpus=isinstance(model.base.get_decoder(), FSDPModule),
            **_PLAIN,
            **(drawing if sampling.temperature > 0 else {"do_sample": False}),
        )
    answers = [_ended(row, stop_ids) for row in output[:, input_ids.shape[1] :].tolist()]
    per_prompt = sampling.answers_per_prompt
    return [answers[i : i + per_prompt] for i in range(0, len(answers), per_prompt)]


def _ended(answer: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Cut an answer after its first stop token; the tokens after it are padding."""
    end = next((index for index, token in enumerate(answer) if token in stop_ids), len(answer) - 1)
    return answer[: end + 1]


def _left_padded(batch: PackedBatch, pad_id: int) -> tuple[Tensor, Tensor]:
    rows = [row.flip(0) for row in torch.split(batch.input_ids, list(batch.lengths))]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).flip(1)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
    return ids, mask


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad) if isinstance(pad, int) else 0


def _stop_ids(model: AdaptedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    config = model.base.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else []
    known = {*(ends if isinstance(ends, list) else [ends]), getattr(tokenizer, "eos_token_id", None)}
    return sorted(token for token in known if isinstance(token, int))
