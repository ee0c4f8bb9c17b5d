"""Evidence of the claims: the numbers of one adapter type in one world, by arm and seed."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd

from lightning_em.analysis.claims.rules import STUDY, Rules
from lightning_em.analysis.claims.verdicts import MissingError
from lightning_em.analysis.roles import role_named
from lightning_em.analysis.trajectory_readings import PAIR_ROLE
from lightning_em.records import TABLE_COLUMNS


class Series(NamedTuple):
    """A quantity in the measurements, at some or all of its coordinates.

    Attributes:
        source: Probe or other origin, as in `Reading.source`.
        quantity: Name of the quantity.
        coordinates: Names and values of the fixed coordinates, sorted by name, as text.
    """

    source: str
    quantity: str
    coordinates: tuple[tuple[str, str], ...] = ()

    def at(self, **coordinates: float | str) -> "Series":
        """Return the series at further coordinates."""
        further = {name: _as_text(value) for name, value in coordinates.items()}
        return self._replace(coordinates=tuple(sorted({**dict(self.coordinates), **further}.items())))

    def __str__(self) -> str:
        places = ", ".join(f"{name}={value}" for name, value in self.coordinates)
        return f"{self.source}/{self.quantity}" + (f"[{places}]" if places else "")


def _as_text(coordinate: float | str) -> str:
    """Format a coordinate; equal numbers give equal texts, whether read from a record or from a CSV file."""
    try:
        return f"{float(coordinate):g}"
    except ValueError:
        return str(coordinate)


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


def with_series(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the measurements with a column `series`, one `Series` for each row."""
    names = ["source", "quantity", *(str(name) for name in frame if name not in TABLE_COLUMNS)]
    # build each series once, because a study repeats the same few hundred in all runs
    number = frame.groupby(names, sort=False, dropna=False).ngroup()
    distinct = frame.loc[~number.duplicated(), names].to_dict("records")
    known = [
        Series(row.pop("source"), row.pop("quantity")).at(
            **{str(name): value for name, value in row.items() if not pd.isna(value)}
        )
        for row in distinct
    ]
    return frame.assign(series=number.map(known.__getitem__))


BAD_RATE = Series("behaviour", "bad_rate")
_PREFERRED = Series("preference_margin", "bad_preferred")


class RunNumbers:
    """Numbers of one run.

    If no answers were judged, the share of questions for which the model prefers the bad answer replaces the
    rate of bad answers.

    Args:
        name: Name of the run, for messages.
        rows: Rows of the measurements that belong to the run, from `with_series`.
    """

    def __init__(self, name: str, rows: pd.DataFrame) -> None:
        self.name = name
        measured = {series[:2] for series in rows["series"]}
        self.stands_in = BAD_RATE[:2] not in measured and _PREFERRED[:2] in measured
        self._numbers: dict[tuple[str, str], dict[Series, dict[int, float]]] = {}
        self._last: dict[tuple[str, str], tuple[int, str]] = {}
        self._curves: dict[tuple[Series, str], Curve] = {}
        columns = (rows[column].to_list() for column in ("series", "step", "value", "protocol"))
        for found, step, value, protocol in zip(*columns, strict=True):
            stands_in = self.stands_in and found[:2] == _PREFERRED[:2]
            series = BAD_RATE._replace(coordinates=found.coordinates) if stands_in else found
            of = series[:2]
            self._numbers.setdefault(of, {}).setdefault(series, {})[step] = value
            self._last[of] = max(self._last.get(of, (step, protocol)), (step, protocol))

    def value(self, series: Series) -> float:
        """Return a number at the last step at which its quantity was measured.

        Raises:
            MissingError: If it was not measured at these coordinates then.
        """
        if math.isnan(value := self.get(series)):
            raise MissingError(f"{self.name}: no {series}")
        return value

    def get(self, series: Series) -> float:
        """Return `value`; NaN if it was not measured."""
        return self.by_step(series).get(self._last.get(series[:2], (0, ""))[0], math.nan)

    def by_step(self, series: Series) -> Mapping[int, float]:
        """Return a number at each of its steps; empty if it was not measured."""
        return self._numbers.get(series[:2], {}).get(series, {})

    def along(self, series: Series, name: str) -> dict[float, float]:
        """Return the last numbers by the value of one more coordinate, ascending; empty if none was measured."""
        found, fixed = {}, dict(series.coordinates)
        for own in self._numbers.get(series[:2], {}):
            others = dict(own.coordinates)
            if (place := others.pop(name, None)) is not None and others == fixed:
                found[float(place)] = self.get(own)
        return {place: found[place] for place in sorted(found) if not math.isnan(found[place])}

    def curve(self, series: Series, along: str) -> Curve:
        """Return the curve along a coordinate.

        Raises:
            MissingError: If there is none at these other coordinates.
        """
        if (series, along) not in self._curves:
            if not (known := self.along(series, along)):
                raise MissingError(f"{self.name}: no {series} by {along}")
            self._curves[series, along] = Curve(tuple(known), tuple(known.values()))
        return self._curves[series, along]

    def protocol(self, series: Series) -> str | None:
        """Return the protocol of a quantity at its last step; None if it was not measured."""
        return self._last.get(series[:2], (0, None))[1]


def measured_alike(series: Series, runs: Sequence[RunNumbers]) -> None:
    """Check that a quantity was measured with one protocol; runs without a protocol are ignored.

    Raises:
        MissingError: If the protocols differ, because the numbers are then not comparable.
    """
    if len({run.protocol(series) for run in runs} - {None}) > 1:
        names = " and ".join(run.name for run in runs)
        raise MissingError(
            f"{series} of {names} was measured with other settings, rows or base model: probe them alike"
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
        own = with_series(frame[(frame["adapter"] == adapter) & (frame["world"] == world)])
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

    def unit(self, series: Series) -> str:
        """Return the unit of a quantity; empty if it was not measured."""
        frame = self._frame[self._frame["unit"] != ""]
        rows = frame[(frame["source"] == series.source) & (frame["quantity"] == series.quantity)]
        return "" if rows.empty else str(rows["unit"].iloc[0])

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

    def runs(self, arm: Arm) -> list[RunNumbers]:
        """Return the numbers of all runs of one arm, by seed."""
        return [self._runs[arm, seed] for seed in self.seeds_of(arm)]

    @property
    def pairs(self) -> list[RunNumbers]:
        """Numbers of the pair analyses of each seed that has any."""
        return [self._pairs[seed] for seed in sorted(self._pairs)]

    def run(self, arm: Arm | str, seed: int) -> RunNumbers:
        """Return the numbers of the run of one arm and seed.

        Raises:
            MissingError: If there is no such run.
        """
        arm = self.arm(arm) if isinstance(arm, str) else arm
        if (arm, seed) not in self._runs:
            raise MissingError(f"no {arm} run of {self.adapter} in the {self.world} world, seed {seed}")
        return self._runs[arm, seed]

    def alike(self, arms: Sequence[Arm | str], seed: int, series: Series) -> list[RunNumbers]:
        """Return the runs of one seed after checking that a quantity is comparable between them.

        Raises:
            MissingError: If a run is missing, or the numbers were measured with different protocols.
        """
        runs = [self.run(arm, seed) for arm in arms]
        measured_alike(series, runs)
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


def evidence_of(frame: pd.DataFrame) -> list[Evidence]:
    """Return the evidence of each adapter type in each world, in the order of the measurements.

    Raises:
        ValueError: If two runs of one seed have the same role and level.
    """
    runs = frame[frame["role"] != STUDY]
    places = dict.fromkeys(zip(runs["world"], runs["adapter"], strict=True))
    return [Evidence(frame, adapter, world) for world, adapter in places]
