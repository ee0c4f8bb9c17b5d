"""What the claims look at: the numbers of one adapter type in one world, by arm and seed."""

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
    """What a run is for, and its number if the role comes in several."""

    role: str
    level: float | None = None

    def __str__(self) -> str:
        role = role_named(self.role)
        name = role.shown_as or self.role
        return name if self.level is None else f"{name} at {role.level.format(self.level)}"


class Curve(NamedTuple):
    """A quantity along a grid, linear between the measured places.

    Attributes:
        places: Ascending.
        values: One a place.
    """

    places: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, place: float) -> float:
        """Value at a place; NaN beyond the measured ones.

        Raises:
            MissingError: If there is one measured place, and it is another one.
        """
        if len(self.places) == 1 and place != self.places[0]:
            raise MissingError(f"measured at {self.places[0]:g} only")
        if math.isnan(place) or not self.places[0] - 1e-12 <= place <= self.places[-1] + 1e-12:
            return math.nan
        return float(np.interp(place, self.places, self.values))

    def last_reaches(self, value: float, end: float) -> float:
        """Largest place up to `end` at which the curve has a value; NaN if it never does."""
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

    Where no answers were judged, the share of questions whose bad answer the model finds likelier stands in for
    the rate of bad answers.

    Args:
        name: For messages.
        rows: Its rows of the measurements.
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
            curve, _, place = quantity.rpartition("@")
            if curve:
                self._places.setdefault(curve, {})[float(place)] = quantity
                self._protocols[curve] = protocol
            self._protocols[quantity] = protocol

    def value(self, quantity: str) -> float:
        """A quantity at its last step."""
        return list(self.by_step(quantity).values())[-1]

    def by_step(self, quantity: str) -> Mapping[int, float]:
        """A quantity at each of its steps, ascending."""
        if quantity not in self._steps:
            raise MissingError(f"{self.name}: no {quantity}")
        return self._steps[quantity]

    def curve(self, quantity: str) -> Curve:
        """All `quantity@place` at their last step."""
        places = self._places.get(quantity)
        if not places:
            raise MissingError(f"{self.name}: no {quantity}@...")
        return Curve(tuple(sorted(places)), tuple(self.value(places[place]) for place in sorted(places)))

    def protocol(self, quantity: str) -> str | None:
        """By which a quantity, or a curve, was measured at its last step; None if it was not."""
        return self._protocols.get(quantity)


def measured_alike(quantity: str, runs: Sequence[RunNumbers]) -> None:
    """Compare the protocols of a quantity or a curve; who has none is no concern here.

    Raises:
        MissingError: If they differ: the numbers do not answer one question.
    """
    if len({run.protocol(quantity) for run in runs} - {None}) > 1:
        names = " and ".join(run.name for run in runs)
        raise MissingError(
            f"{quantity} of {names} was measured with other settings or rows, or in another world: probe them alike"
        )


class Evidence:
    """Numbers of all runs of one adapter type in one world.

    Args:
        frame: From `measurements`.
        adapter: Which adapter type.
        world: Which world.

    Raises:
        ValueError: If two runs play the same role.
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
        """What the study says about its claims."""
        return Rules.of(self._frame)

    @property
    def stands_in(self) -> bool:
        """Whether the preference for given bad answers stands in for answers of the model's own."""
        return any(run.stands_in for run in self._runs.values())

    @property
    def seeds(self) -> list[int]:
        """All training seeds of this adapter in this world."""
        return sorted({seed for _, seed in self._runs})

    def seeds_of(self, arm: Arm) -> list[int]:
        """Training seeds of one arm; a search may have fewer than the rest."""
        return sorted(seed for own, seed in self._runs if own == arm)

    def arms(self, *roles: str) -> list[Arm]:
        """Arms of these roles, all if none is named, by level and then as they come in the measurements."""
        found = dict.fromkeys(arm for arm, _ in self._runs if arm.role in roles or not roles)
        return sorted(found, key=lambda arm: -1.0 if arm.level is None else arm.level)

    def arm(self, role: str, near: float | None = None, required: bool = True) -> Arm:
        """The arm of a role; of several the one whose level is nearest, by ratio.

        Args:
            role: The role.
            near: Level that is wanted.
            required: If not, an arm that is not there is missed where a run of it is asked for, and no earlier.

        Raises:
            MissingError: If there is none, or there are several and none is asked for.
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
        return min(arms, key=lambda arm: abs(math.log(max(arm.level or 0.0, 1e-12) / near)))

    def run(self, arm: Arm | str, seed: int) -> RunNumbers:
        """Numbers of the run that plays a role."""
        arm = self.arm(arm) if isinstance(arm, str) else arm
        if (arm, seed) not in self._runs:
            raise MissingError(f"no {arm} run of {self.adapter} in the {self.world} world, seed {seed}")
        return self._runs[arm, seed]

    def alike(self, arms: Sequence[Arm | str], seed: int, quantity: str) -> list[RunNumbers]:
        """Runs of one seed whose numbers of a quantity or a curve may be compared.

        Raises:
            MissingError: If a run is missing, or the numbers were measured by different protocols.
        """
        runs = [self.run(arm, seed) for arm in arms]
        measured_alike(quantity, runs)
        return runs

    def pair(self, seed: int) -> RunNumbers:
        """Numbers of the analyses of several runs of one seed."""
        if seed not in self._pairs:
            raise MissingError(f"no pair analysis of {self.adapter} in the {self.world} world, seed {seed}")
        return self._pairs[seed]

    def of(self, adapter: str) -> "Evidence":
        """The same world with another adapter type."""
        return Evidence(self._frame, adapter, self.world)
