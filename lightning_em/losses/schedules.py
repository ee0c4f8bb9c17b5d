"""Schedules of the KL weight over optimizer steps."""

import math
from abc import ABC, abstractmethod


class KLWeightSchedule(ABC):
    """Schedule of the KL weight during training; set it in YAML as `model.objective.schedule`."""

    @abstractmethod
    def factor(self, step: int) -> float:
        """Return the factor on `kl_weight` for an optimizer step (the first step is 0)."""

    def observe(self, kl_nats_per_token: float) -> None:  # noqa: B027 (most schedules ignore the KL)
        """Receive the KL of a whole optimizer step, over all ranks."""

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs in addition to the step number."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027
        """Restore `state_dict()`."""


class Constant(KLWeightSchedule):
    """The weight never changes."""

    def factor(self, step: int) -> float:
        return 1.0


class OffAt(KLWeightSchedule):
    """Full weight before `step`, zero weight from `step` on (the reverted arm)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def factor(self, step: int) -> float:
        return 1.0 if step < self.step else 0.0


class OnAt(KLWeightSchedule):
    """Zero weight before `step`, full weight from `step` on (the reverse arm)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def factor(self, step: int) -> float:
        return 0.0 if step < self.step else 1.0


class Ramp(KLWeightSchedule):
    """Linear increase from zero weight at step 0 to full weight at step `num_steps`."""

    def __init__(self, num_steps: int) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}; set it in Ramp's init_args.")
        self.num_steps = num_steps

    def factor(self, step: int) -> float:
        return min(1.0, step / self.num_steps)


class HoldKL(KLWeightSchedule):
    """Adjust the weight so that the KL stays at a target, by dual ascent on the logarithm of the weight.

    After each optimizer step, log(weight) changes by `rate * (kl / target - 1)`, clipped to [-1, 1].

    Args:
        target: Target KL in nats per token.
        rate: Step size of the ascent.
        max_factor: Bound on the factor, which stays between 1 / max_factor and max_factor.
    """

    def __init__(self, target: float, rate: float = 0.1, max_factor: float = 1e4) -> None:
        if target <= 0 or rate <= 0 or max_factor <= 1:
            raise ValueError(
                f"HoldKL needs target > 0, rate > 0 and max_factor > 1, got {target}, {rate}, {max_factor}; "
                "change model.objective.schedule.init_args."
            )
        self.target, self.rate, self.max_factor = target, rate, max_factor
        self.log_factor = 0.0

    def factor(self, step: int) -> float:
        return math.exp(self.log_factor)

    def observe(self, kl_nats_per_token: float) -> None:
        if not math.isfinite(kl_nats_per_token):
            return  # the health check stops such a run; keep the last finite weight for inspection
        bound = math.log(self.max_factor)
        move = self.rate * (kl_nats_per_token / self.target - 1)
        self.log_factor = min(bound, max(-bound, self.log_factor + min(1.0, max(-1.0, move))))

    def state_dict(self) -> dict[str, float]:
        return {"log_factor": self.log_factor}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.log_factor = state["log_factor"]
