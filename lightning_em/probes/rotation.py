"""Rotation: the local cosine of the training trajectory over checkpoints."""

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lightning_em.analysis import Update, read_update
from lightning_em.manifest import manifest_problems
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.records import Point, Quantity
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)


class Rotation(Probe):
    """Local cosine cos(v[t-s] - v[t], v[t+s] - v[t]) of the trajectory: -1 straight, 0 a right angle, 1 a reversal.

    v is the write direction: alpha x vector, or all B matrices of a LoRA, concatenated. The turn at a checkpoint
    is known and recorded `span` checkpoints later; the coordinate `at_step` is the step of the turn itself. No
    turn is recorded if the two neighbors are at unequal distances in steps, if the adapter has not moved, or
    for adapters whose `update` gives no low-rank parts. `lightning_em.analysis.rotation` computes the same
    cosines for a finished run.

    Points, with coordinate `at_step`: `local_cosine` (unit cosine), and `longer_arm`, the length of the longer
    of the two differences. Its unit is norm, as for effective norms, for a shift such as a vector, and
    parameter_norm for a LoRA.

    Args:
        span: s in checkpoints; `checkpoint.keep_last` must keep at least 2 s + 1 checkpoints.
        shortest_arm: Minimum length of the longer arm; shorter arms are dominated by noise and turn at random.

    Raises:
        ValueError: If `span` is not positive or `shortest_arm` is negative.

    Source: arXiv:2602.07852 (rotation; its shortest arm is .0035 for a rank-1 LoRA).
    """

    name = "rotation"
    quantities = (  # the measurements of a study compute the turns from the checkpoints themselves
        Quantity("local_cosine", "cosine", ("at_step",), in_study="none"),
        Quantity("longer_arm", "norm", ("at_step",), in_study="none"),
        Quantity("longer_arm", "parameter_norm", ("at_step",), in_study="none"),
    )
    reads = ()

    def __init__(self, span: int = 1, shortest_arm: float = 0.0) -> None:
        if span < 1 or not 0 <= shortest_arm < math.inf:
            raise ValueError(
                f"span must be 1 checkpoint or more and shortest_arm not negative, got {span} and "
                f"{shortest_arm}; set init_args of Rotation."
            )
        self.span, self.shortest_arm = span, float(shortest_arm)
        self._run: RunFolder | None = None
        self._step = 0

    def settings(self) -> Mapping[str, Any]:
        return {"span": self.span, "shortest_arm": self.shortest_arm}

    def for_checkpoint(self, run: RunFolder, step: int) -> "Rotation":
        bound = copy.copy(self)
        bound._run, bound._step = run, step
        return bound

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        if self._run is None:
            raise ValueError("Rotation looks at the checkpoints of a run; use its for_checkpoint(run, step).")
        try:
            path = self._path(self._run)
        except ValueError as error:  # the adapter declares no low-rank parts
            rank_zero_only(logger.warning)("%s measures nothing: %s", self.name, error)
            return []
        if len(path) <= 2 * self.span:
            return []
        # path ends at this checkpoint and has 2 s + 1 entries, so this takes t - s, t and t + s
        (before, start), (turn, here), (_, end) = path[:: self.span]
        back, on = (arm.write_direction - here.write_direction for arm in (start, end))
        lengths = float(np.linalg.norm(back)), float(np.linalg.norm(on))
        if turn - before != self._step - turn or min(lengths) == 0 or max(lengths) <= self.shortest_arm:
            return []
        place = {"at_step": turn}
        unit = "norm" if here.kind == "shift" else "parameter_norm"
        return [
            Point("local_cosine", float(back @ on) / (lengths[0] * lengths[1]), "cosine", place),
            Point("longer_arm", max(lengths), unit, place),
        ]

    def _path(self, run: RunFolder) -> list[tuple[int, Update]]:
        """This checkpoint and the valid ones before it, ascending, at most 2 span + 1 in total."""
        found: list[tuple[int, Update]] = []
        for step in reversed([step for step in run.steps() if step <= self._step]):
            try:
                if problems := manifest_problems(run.checkpoint(step)):
                    message = "checkpoint step %d is corrupt and skipped: %s"
                    rank_zero_only(logger.warning)(message, step, "; ".join(problems))
                    continue
                found.insert(0, (step, read_update(run.checkpoint(step))))
            except FileNotFoundError:  # rank zero deleted an old checkpoint (`checkpoint.keep_last`)
                continue
            if len(found) > 2 * self.span:
                break
        return found if found and found[-1][0] == self._step else []
