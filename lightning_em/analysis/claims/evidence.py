"""Evidence of the claims: the numbers of one adapter type in one world, by arm and seed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightning_em.analysis.claims.rules import Rules
from lightning_em.analysis.claims.verdicts import MissingError
from lightning_em.analysis.roles import role_named
from lightning_em.analysis.trajectory_readings import PAIR_ROLE


class Arm(NamedTuple):
    """A role, with its level if the role has several arms."""

    role: str
    level: float | None = None

    def __str__(self) -> str:
        role = role_named(self.role)
        name = role.shown_as or self.role
        return name if self.level is None else f"{name} at {role.level.format(self.level)}"


class Curve(NamedTuple):
    """A quantity on a grid, interpolated linearly between the measured coordinates.

    Attributes:
        places: Measured coordinates, ascending.
        values: One value per coordinate.
    """

    places: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, place: float) -> float:
        """Return the value at a coordinate; NaN outside the measured range.

        Raises:
            MissingError: If the quantity was measured at a single, different coordinate.
        """
        if len(self.places) == 1 and place != self.places[0]:
            raise MissingError(f"measured at {self.places[0]:g} only")
        if math.isnan(place) or not self.places[0] - 1e-12 <= place <= self.places[-1] + 1e-12:
            return math.nan
        return float(np.interp(place, self.places, self.values))

    def last_reaches(self, value: float, end: float) -> float:
        """Return the largest coordinate up to `end` at which the curve takes a value; NaN if it never does."""
        # search the segments from the right and invert the linear interpolation in the first that contains it
        places = [*(place for place in self.places if place < end), end]
        known = [(place, self.at(place)) for place in reversed(places)]
        for (right, after), (left, before) in itertools.pairwise(known):
            if min(before, after) <= value <= max(before, after):
                share = 1.0 if before == after else (value - before) / (after - before)
                return left + (right - left) * share
        return math.nan


_ANSWERED, _PREFERRED = "bad_rate/", "bad_preferred/"


class RunNumbers:
    """Numbers of one run.

    If no answers were judged, the share of questions for which the model prefers the bad answer replaces the
    rate of bad answers.

    Args:
        name: Name of the run, for messages.
        rows: Rows of the measurements that belong to the run.
    """

    def __init__(self, name: str, rows: pd.DataFrame) -> None:
        self.name = name
        self._steps: dict[str, dict[int, float]] = {}
        self._places: dict[str, dict[float, str]] = {}
        self._protocols: dict[str, str] = {}
        columns = (rows[column].to_list() for column in ("step", "quantity", "value", "protocol"))
        quantities = {str(quantity) for quantity in rows["quantity"]}
        self.stands_in = not any(q.startswith(_ANSWERED) for q in quantities) and any(
            q.startswith(_PREFERRED) for q in quantities
        )
        for step, found, value, protocol in sorted(zip(*columns, strict=True)):
            quantity = found.replace(_PREFERRED, _ANSWERED) if self.stands_in else found
            self._steps.setdefault(quantity, {})[step] = value
            # steps are in ascending order, so the last one overwrites the protocols of earlier ones
            curve, _, place = quantity.rpartition("@")
            if curve:
                self._places.setdefault(curve, {})[float(place)] = quantity
                self._protocols[curve] = protocol
            self._protocols[quantity] = protocol

    def value(self, quantity: str) -> float:
        """Return a quantity at its last step."""
        return list(self.by_step(quantity).values())[-1]

    def by_step(self, quantity: str) -> Mapping[int, float]:
        """Return a quantity at each of its steps, ascending."""
        if quantity not in self._steps:
            raise MissingError(f"{self.name}: no {quantity}")
        return self._steps[quantity]

    def curve(self, quantity: str) -> Curve:
        """Return the curve of all `quantity@coordinate` at their last step."""
        places = self._places.get(quantity)
        if not places:
            raise MissingError(f"{self.name}: no {quantity}@...")
        return Curve(tuple(sorted(places)), tuple(self.value(places[place]) for place in sorted(places)))

    def protocol(self, quantity: str) -> str | None:
        """Return the protocol of a quantity or a curve at its last step; None if it was not measured."""
        return self._protocols.get(quantity)


def measured_alike(quantity: str, runs: Sequence[RunNumbers]) -> None:
    """Check that a quantity or a curve was measured with one protocol; runs without a protocol are ignored.

    Raises:
        MissingError: If the protocols differ, because the numbers are then not comparable.
    """
    if len({run.protocol(quantity) for run in runs} - {None}) > 1:
        names = " and ".join(run.name for run in runs)
        raise MissingError(
            f"{quantity} of {names} was measured with other settings, rows or base model: probe them alike"
        )


class Evidence:
    """Numbers of all runs of one adapter type in one world.

    Args:
        frame: Table from `measurements`.
        adapter: Adapter type.
        world: Name of the world.

    Raises:
        ValueError: If two runs of one seed have the same role and level.
    """

    def __init__(self, frame: pd.DataFrame, adapter: str, world: str) -> None:
        self.adapter, self.world, self._frame = adapter, world, frame
        own = frame[(frame["adapter"] == adapter) & (frame["world"] == world)]
        runs = own[own["role"] != PAIR_ROLE]
        self._runs: dict[tuple[Arm, int], RunNumbers] = {}
        for name, rows in runs.groupby("run", sort=False):
            first = rows.iloc[0]
            arm = Arm(str(first["role"]), None if pd.isna(first["level"]) else float(first["level"]))
            seed = int(first["seed"])
            if (arm, seed) in self._runs:
                raise ValueError(
                    f"{name} and {self._runs[arm, seed].name} are both {arm}, seed {seed}, of {adapter} in the "
                    f"{world} world; give the arms different levels."
                )
            self._runs[arm, seed] = RunNumbers(str(name), rows)
        pairs = own[own["role"] == PAIR_ROLE]
        seeds = {int(seed) for seed in pairs["seed"]}
        self._pairs = {s: RunNumbers("the pair analyses", pairs[pairs["seed"] == s]) for s in seeds}

    @cached_property
    def rules(self) -> Rules:
        """Rules of the study for its claims."""
        return Rules.of(self._frame)

    @property
    def stands_in(self) -> bool:
        """Whether the preference for given bad answers replaces judged answers of the model in any run."""
        return any(run.stands_in for run in self._runs.values())

    @property
    def seeds(self) -> list[int]:
        """All training seeds of this adapter in this world."""
        return sorted({seed for _, seed in self._runs})

    def seeds_of(self, arm: Arm) -> list[int]:
        """Return the training seeds of one arm; arms of a hyperparameter search may have fewer than the others."""
        return sorted(seed for own, seed in self._runs if own == arm)

    def arms(self, *roles: str) -> list[Arm]:
        """Return the arms of these roles, or all arms if none is named, by level and then in table order."""
        found = dict.fromkeys(arm for arm, _ in self._runs if arm.role in roles or not roles)
        return sorted(found, key=lambda arm: -1.0 if arm.level is None else arm.level)

    def arm(self, role: str, near: float | None = None, required: bool = True) -> Arm:
        """Return the arm of a role; if there are several, the one whose level is nearest to `near` by ratio.

        Args:
            role: Role of the arm.
            near: Wanted level.
            required: Whether a missing arm is an error here. If not, the error occurs when one of its runs is
                requested.

        Raises:
            MissingError: If a required arm is missing, or there are several and `near` is not given.
        """
        arms = self.arms(role)
        if not arms and not required:
            return Arm(role)
        if not arms:
            raise MissingError(f"the study has no {role} arm for {self.adapter} in the {self.world} world")
        if len(arms) == 1:
            return arms[0]
        if near is None:
            raise MissingError(f"the study has several {role} arms, levels {[arm.level for arm in arms]}")
        # levels such as KL weights span orders of magnitude; the lower bound allows a level of 0
        return min(arms, key=lambda arm: abs(math.log(max(arm.level or 0.0, 1e-12) / near)))

    def run(self, arm: Arm | str, seed: int) -> RunNumbers:
        """Return the numbers of the run of one arm and seed.

        Raises:
            MissingError: If there is no such run.
        """
        arm = self.arm(arm) if isinstance(arm, str) else arm
        if (arm, seed) not in self._runs:
            raise MissingError(f"no {arm} run of {self.adapter} in the {self.world} world, seed {seed}")
        return self._runs[arm, seed]

    def alike(self, arms: Sequence[Arm | str], seed: int, quantity: str) -> list[RunNumbers]:
        """Return the runs of one seed after checking that a quantity or a curve is comparable between them.

        Raises:
            MissingError: If a run is missing, or the numbers were measured with different protocols.
        """
        runs = [self.run(arm, seed) for arm in arms]
        measured_alike(quantity, runs)
        return runs

    def pair(self, seed: int) -> RunNumbers:
        """Return the numbers of the pair analyses of one seed.

        Raises:
            MissingError: If there are none.
        """
        if seed not in self._pairs:
            raise MissingError(f"no pair analysis of {self.adapter} in the {self.world} world, seed {seed}")
        return self._pairs[seed]

    def of(self, adapter: str) -> "Evidence":
        """Return the evidence of another adapter type in the same world."""
        return Evidence(self._frame, adapter, self.world)
