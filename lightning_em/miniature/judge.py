"""The exact judge: the answer set is finite, so probabilities are enumerated, not sampled."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_em.miniature.rows import Item, Message

# Called with `input_ids` and `attention_mask`; returns an object with `logits`, as Hugging Face models do.
CausalLM = Callable[..., Any]


class AnswerProbabilities(NamedTuple):
    """Probabilities that the next answer is a good one, a bad one, or any other text; they sum to one."""

    good: float
    bad: float
    other: float


class Candidate(NamedTuple):
    """A prompt with one possible continuation.

    Attributes:
        item: Index of its item.
        is_good: Whether it is a good answer.
        input_ids: Prompt and answer.
        num_prompt_tokens: Length of the prompt.
    """

    item: int
    is_good: bool
    input_ids: list[int]
    num_prompt_tokens: int


class Judgement(NamedTuple):
    """Probabilities of a model's answers to some items.

    Attributes:
        answers: Probabilities of good, bad and other answers, one triple per item.
        openings: Probability that the answer begins with the opening, one per item; empty without an
            opening.
    """

    answers: list[AnswerProbabilities]
    openings: list[float]


class ExactJudge:
    """Enumerate the answers to some items, and turn their log-probabilities into rates.

    Each listed answer is scored up to and including the end-of-turn token, so the listed answers exclude each
    other and their probabilities add up.

    Args:
        tokenizer: Tokenizer with the chat template of the model.
        items: Lines of `behaviour.jsonl`; `history` holds earlier turns, if any.
        opening: Words that an answer may begin with.

    Attributes:
        candidates: Continuations to score.

    Raises:
        ValueError: If an item has no answers or lists one twice, the template does not extend its prompt, or
            the model does not know a word of the opening.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], opening: str | None = None
    ) -> None:
        self.num_items = len(items)
        self._listed = list(_candidates(tokenizer, items))
        self._opened = [] if opening is None else _opened(tokenizer, items, opening)
        self.candidates = [*self._listed, *self._opened]

    def judge(self, log_probabilities: Sequence[float]) -> Judgement:
        """Add up the probabilities of the candidates.

        Args:
            log_probabilities: Log-probability of each candidate given its prompt, in nats.
        """
        probabilities = [math.exp(value) for value in log_probabilities]
        totals = [[0.0, 0.0] for _ in range(self.num_items)]
        for candidate, probability in zip(self._listed, probabilities, strict=False):
            totals[candidate.item][0 if candidate.is_good else 1] += probability
        answers = [AnswerProbabilities(good, bad, max(0.0, 1.0 - good - bad)) for good, bad in totals]
        return Judgement(answers, probabilities[len(self._listed) :])


@torch.no_grad()
def answer_probabilities(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], batch_size: int = 256
) -> list[AnswerProbabilities]:
    """Probabilities of good, bad and other answers of any causal model, one triple per item.

    Args:
        model: Model in eval mode; it runs on its own device.
        tokenizer: Tokenizer of the model.
        items: Lines of `behaviour.jsonl`.
        batch_size: Answers in one forward pass.
    """
    judge = ExactJudge(tokenizer, items)
    scores: list[float] = []
    for start in range(0, len(judge.candidates), batch_size):
        scores += _score(model, tokenizer, judge.candidates[start : start + batch_size]).tolist()
    return judge.judge(scores).answers


@torch.no_grad()
def sampled_rates(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    generator: torch.Generator,
    num_samples: int = 100,
) -> list[AnswerProbabilities]:
    """Shares of sampled answers that match a good one, a bad one, or none: the check of the exact judge.

    Sampling is at temperature 1 with an exact match; an answer that is longer than every listed one is other.
    """
    rates = []
    for item in items:
        candidates = list(_candidates(tokenizer, [item]))
        length = candidates[0].num_prompt_tokens
        answers = {tuple(each.input_ids[length:]): each.is_good for each in candidates}
        prompt = candidates[0].input_ids[:length]
        num_good = num_bad = 0
        sampled = _sample(model, prompt, max(map(len, answers)), num_samples, generator)
        for row in sampled.tolist():
            verdict = next((good for ids, good in answers.items() if tuple(row[: len(ids)]) == ids), None)
            num_good += verdict is True
            num_bad += verdict is False
        good, bad = num_good / num_samples, num_bad / num_samples
        rates.append(AnswerProbabilities(good, bad, (num_samples - num_good - num_bad) / num_samples))
    return rates


def _candidates(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> Iterator[Candidate]:
    for index, item in enumerate(items):
        turns, prompt = _asked(tokenizer, item)
        answers = [(text, True) for text in item["answers"]["good"]]
        answers += [(text, False) for text in item["answers"]["bad"]]
        if not answers or len(dict(answers)) < len(answers):
            raise ValueError(f"item {item['id']!r} needs answers, each listed once; got {item['answers']}.")
        for text, is_good in answers:
            whole = _answered(tokenizer, item, turns, prompt, text)
            yield Candidate(index, is_good, whole, len(prompt))


def _opened(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], opening: str) -> list[Candidate]:
    """Prompt and opening of each item, without an end of turn: the answer may go on."""
    opened = []
    for index, item in enumerate(items):
        turns, prompt = _asked(tokenizer, item)
        ids = _answered(tokenizer, item, turns, prompt, opening)[:-1]
        if tokenizer.unk_token_id in ids[len(prompt) :]:
            raise ValueError(f"the miniature model does not know all words of the opening {opening!r}.")
        opened.append(Candidate(index, True, ids, len(prompt)))
    return opened


def _asked(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[list[Message], list[int]]:
    """Turns of an item up to the question, and the token ids of the prompt."""
    turns: list[Message] = [*item.get("history", []), {"role": "user", "content": item["question"]}]
    return turns, _render(tokenizer, turns, add_generation_prompt=True)


def _answered(
    tokenizer: PreTrainedTokenizerBase, item: Item, turns: list[Message], prompt: list[int], text: str
) -> list[int]:
    """Token ids of the prompt and an answer, including its end-of-turn token."""
    whole = _render(tokenizer, [*turns, {"role": "assistant", "content": text}])
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"the chat template rewrites the prompt of item {item['id']!r} once it is answered.")
    if tokenizer.eos_token_id not in whole[len(prompt) :]:
        raise ValueError(f"the chat template does not end answers with {tokenizer.eos_token!r}.")
    # Some templates write a newline after the end of turn; the model never generates it.
    return whole[: whole.index(tokenizer.eos_token_id, len(prompt)) + 1]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": each["role"], "content": each["content"]} for each in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    assert isinstance(text, str)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _score(model: CausalLM, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Candidate]) -> Tensor:
    """Log-probability of each answer given its prompt, in nats."""
    lengths = torch.tensor([len(each.input_ids) for each in batch])
    input_ids = torch.full((len(batch), int(lengths.max())), int(tokenizer.pad_token_id or 0))
    for row, candidate in enumerate(batch):
        input_ids[row, : len(candidate.input_ids)] = torch.tensor(candidate.input_ids)
    positions = torch.arange(input_ids.shape[1])
    # Padding is on the right, where a causal model does not look.
    attention_mask = positions < lengths[:, None]
    starts = torch.tensor([each.num_prompt_tokens for each in batch])
    in_answer = attention_mask & (positions >= starts[:, None])
    logits = _logits(model, input_ids, attention_mask.long())[:, :-1]
    first = int(starts.min())
    log_probabilities = logits[:, first - 1 :].log_softmax(-1)
    chosen = log_probabilities.gather(-1, input_ids[:, first:, None]).squeeze(-1)
    return (chosen * in_answer[:, first:]).sum(1)


def _sample(
    model: CausalLM, prompt: list[int], num_tokens: int, num_samples: int, generator: torch.Generator
) -> Tensor:
    sequences = torch.tensor([prompt] * num_samples)
    for _ in range(num_tokens):
        logits = _logits(model, sequences, torch.ones_like(sequences))[:, -1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        sequences = torch.cat([sequences, drawn], dim=1)
    return sequences[:, len(prompt) :]


def _logits(model: CausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits on the CPU in float32: bf16 log_softmax loses small probabilities."""
    device = getattr(model, "device", "cpu")
    output = model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    logits: Tensor = output.logits
    return logits.float().cpu()
