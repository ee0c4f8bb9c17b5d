"""The training objective: cross-entropy on the narrow rows plus weighted KL on the parallel rows."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_em.batch import CountedPositions, WindowCounts
from lightning_em.losses.functional import TokenSum
from lightning_em.losses.schedules import Constant, KLWeightSchedule


class LossWeights(NamedTuple):
    """Factors on the two sums of a step: one over the step's count, for the KL times its weight."""

    ce: float
    kl: float


class LossTerms(NamedTuple):
    """This micro-batch's share of the losses of its optimiser step; shares add up over ranks and micro-batches.

    Attributes:
        ce: Share of the mean cross-entropy, nats per token.
        kl: Share of the mean KL, nats per token.
    """

    ce: Tensor
    kl: Tensor


@dataclass
class Objective:
    """L = CE(narrow rows) + kl_weight x KL(reference || tuned)(parallel rows).

    Attributes:
        kl_weight: Factor on the KL in nats per token unless `kl_reduction` says otherwise.
        schedule: How the weight moves over steps; constant if not given.
        kl_positions: `response`: KL at the positions that predict response tokens; `all`: at every position.
        kl_reduction: `per_token`: the weight multiplies nats per token; `per_token_and_vocab`: the
            weight is on the scale of the published runs, which divide by the vocabulary size as well.

    Raises:
        ValueError: If `kl_weight` is negative or not finite.

    Source: arXiv:2602.07852.
    """

    kl_weight: float = 0.0
    schedule: KLWeightSchedule | None = None
    kl_positions: CountedPositions = "response"
    kl_reduction: Literal["per_token", "per_token_and_vocab"] = "per_token"

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(
                f"kl_weight must be a finite number >= 0, got {self.kl_weight}; set model.objective.kl_weight."
            )

    def weight_at(self, step: int, vocab_size: int) -> float:
        """Weight in force at an optimiser step, the factor on the KL in nats per token.

        Args:
            step: Optimiser steps taken so far.
            vocab_size: The model's, from its config; used by `per_token_and_vocab` only.
        """
        weight = self.kl_weight * (self.schedule or Constant()).factor(step)
        return weight / vocab_size if self.kl_reduction == "per_token_and_vocab" else weight

    def _counts(self, window: WindowCounts) -> tuple[int, int]:
        """Counted tokens of the whole optimiser step, CE and KL; what the sums are divided by."""
        kl = window.kl_response if self.kl_positions == "response" else window.kl_all
        return max(window.ce, 1), max(kl, 1)

    def weights(self, window: WindowCounts, weight: float) -> LossWeights:
        """What to multiply the sums by, so that their sum over a step is its loss."""
        ce_count, kl_count = self._counts(window)
        return LossWeights(1 / ce_count, weight / kl_count)

    def terms(self, ce: TokenSum, kl: TokenSum | None, window: WindowCounts) -> LossTerms:
        """Divide the sums by the counts of the whole optimiser step, to be logged."""
        ce_count, kl_count = self._counts(window)
        ce_share = ce.total.detach() / ce_count
        return LossTerms(ce_share, ce_share.new_zeros(()) if kl is None else kl.total.detach() / kl_count)

    def observe(self, kl_nats_per_token: float) -> None:
        """Tell the schedule the KL just measured over a whole optimiser step, all ranks."""
        if self.schedule is not None:
            self.schedule.observe(kl_nats_per_token)

    def state_dict(self) -> dict[str, float]:
        """The schedule's state."""
        return self.schedule.state_dict() if self.schedule is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the schedule's state."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state)
