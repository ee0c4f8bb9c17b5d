"""Rules that a study sets in advance under `claims`: when a claim about rates holds, and claims of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pandas as pd

from lightning_em.analysis.cells import Cell, Reading
from lightning_em.analysis.claims.verdicts import MissingError
from lightning_em.records import TABLE_COLUMNS, Point

STUDY = "study"
"""Role of the measurement rows that hold the rules, which belong to no world and no adapter."""
_SOURCE = "claims"


@dataclass(frozen=True)
class Difference:
    """A claim of the study's own: of the general and the narrow solution, one has more of a quantity than the other.

    Attributes:
        more: Role of the solution that has more, `general` or `narrow`.
        source: Probe that measures the quantity, or another `Reading.source`.
        quantity: Name of the quantity.
        coordinates: Coordinates of the quantity, all of them.
        margin: Difference that must be exceeded, in the unit of the quantity.
    """

    more: str
    source: str
    quantity: str
    coordinates: Mapping[str, float | str] = field(default_factory=dict)
    margin: float = 0.0


@dataclass(frozen=True)
class Rules:
    """Margins of rates, the scale at which suppressed misalignment is tested, and the study's own claims.

    Margins have no default because they depend on the instrument: the rates of chance and of the base model
    differ between a toy world with six answers and judged text.

    Attributes:
        rise: Difference above which one rate is noticeably higher than another.
        narrow: Rate below which there are no noticeable bad answers.
        hidden_scale: Scale at which a solution may show bad answers that it hides at scale 1. For sampled rates,
            one scale must be chosen in advance: noise alone raises the maximum over several scales.
        exact_rates: Whether rates are computed exactly instead of sampled. The highest rate of all coherent scales
            is then tested if `hidden_scale` is not set.
        differences: Claims of the study's own, by key.
    """

    rise: float | None = None
    narrow: float | None = None
    hidden_scale: float | None = None
    exact_rates: bool = False
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, content: Mapping[str, Any]) -> "Rules":
        """Create the rules from their fields in JSON."""
        own = {key: Difference(**each) for key, each in content.get("differences", {}).items()}
        return cls(**{**content, "differences": own})

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Rules":
        """Read the rules from the measurements."""
        known: dict[str, Any] = {}
        own: dict[str, Difference] = {}
        for row in frame[frame["role"] == STUDY].to_dict("records"):
            if row["source"] == _SOURCE:
                known[row["quantity"]] = row["value"]
            else:
                at = {str(k): v for k, v in row.items() if k not in TABLE_COLUMNS and not pd.isna(v)}
                own[row["run"]] = Difference(row["arm"], row["source"], row["quantity"], at, row["value"])
        known = {each.name: known[each.name] for each in fields(cls) if each.name in known}
        return cls(**{**known, "exact_rates": bool(known.get("exact_rates", False)), "differences": own})

    def readings(self) -> Iterator[Reading]:
        """Yield the rules as rows of the measurements."""
        for name, value in asdict(self).items():
            if value and name != "differences":
                yield Reading(_cell(STUDY, ""), _SOURCE, 0, Point(name, float(value), ""))
        for key, own in self.differences.items():
            point = Point(own.quantity, own.margin, "", own.coordinates)
            yield Reading(_cell(key, own.more), own.source, 0, point)

    def margin(self, name: str) -> float:
        """Return the margin `rise` or `narrow`.

        Raises:
            MissingError: If the study does not set it.
        """
        value = getattr(self, name)
        if value is None:
            raise MissingError(f"the study names no margin: set claims.{name} in its file")
        return float(value)


def _cell(run: str, arm: str) -> Cell:
    return Cell(run, arm, STUDY, None, "-", "-", 0)
