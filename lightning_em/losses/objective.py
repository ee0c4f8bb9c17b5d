"""The training objective: cross-entropy on the narrow data plus weighted KL on the KL data."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_em.batch import CountedPositions, StepCounts
from lightning_em.losses.functional import TokenSum
from lightning_em.losses.schedules import Constant, KLWeightSchedule


class LossWeights(NamedTuple):
    """Factors on the loss sums of an optimizer step: 1 / count for the CE, and weight / count for the KL."""

    ce: float
    kl: float


class LossTerms(NamedTuple):
    """Contribution of one micro-batch to the mean losses of its optimizer step.

    The mean is the sum of the contributions over ranks and micro-batches.

    Attributes:
        ce: Contribution to the mean cross-entropy, in nats per token.
        kl: Contribution to the mean KL, in nats per token; None if it was not computed.
    """

    ce: Tensor
    kl: Tensor | None


@dataclass
class Objective:
    """L = CE(narrow data) + kl_weight x KL(reference || tuned)(KL data).

    Attributes:
        kl_weight: Weight of the KL; `kl_reduction` sets its unit.
        schedule: Schedule of the weight over optimizer steps; constant if not given.
        kl_positions: `response` computes the KL at positions that predict response tokens, `all` at every position.
        kl_reduction: With `per_token` the weight multiplies the KL in nats per token. With `per_token_and_vocab`
            it multiplies the KL divided by the vocabulary size as well, the convention of the published runs.

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
        """Return the factor on the KL in nats per token at an optimizer step.

        Args:
            step: Number of optimizer steps taken so far.
            vocab_size: Vocabulary size in the model's config; used only by `per_token_and_vocab`.

        Raises:
            ValueError: If the schedule makes the weight negative or not finite.
        """
        weight = self.kl_weight * (self.schedule or Constant()).factor(step)
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"the KL weight at step {step} must be a finite number >= 0, got {weight}; "
                "change model.objective.schedule."
            )
        return weight / vocab_size if self.kl_reduction == "per_token_and_vocab" else weight

    def _counts(self, step_counts: StepCounts) -> tuple[int, int]:
        """Return the divisors of the CE and KL sums: counted tokens of the whole optimizer step, at least 1."""
        kl = step_counts.kl_response if self.kl_positions == "response" else step_counts.kl_all
        return max(step_counts.ce, 1), max(kl, 1)

    def weights(self, step_counts: StepCounts, weight: float) -> LossWeights:
        """Return factors on the sums such that the weighted sums of an optimizer step add up to its loss."""
        ce_count, kl_count = self._counts(step_counts)
        return LossWeights(1 / ce_count, weight / kl_count)

    def terms(self, ce: TokenSum, kl: TokenSum | None, step_counts: StepCounts) -> LossTerms:
        """Divide the sums by the counts of the whole optimizer step, for logging."""
        ce_count, kl_count = self._counts(step_counts)
        return LossTerms(ce.total.detach() / ce_count, None if kl is None else kl.total.detach() / kl_count)

    def observe(self, kl_nats_per_token: float) -> None:
        """Pass the KL of a whole optimizer step, over all ranks, to the schedule."""
        if self.schedule is not None:
            self.schedule.observe(kl_nats_per_token)

    def state_dict(self) -> dict[str, float]:
        """Return the state of the schedule."""
        return self.schedule.state_dict() if self.schedule is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of the schedule."""
        if self.schedule is not None:
            self.schedule.load_state_dict(state)
