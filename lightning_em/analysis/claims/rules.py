"""Rules that a study sets in advance under `claims`: when a claim about rates holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import pandas as pd

from lightning_em.analysis.claims.verdicts import MissingError

STUDY = "study"
"""Role of the measurement rows that hold the rules, which belong to no world and no adapter."""
_PREFIX = "claims/"


@dataclass(frozen=True)
class Rules:
    """Margins of rates, and the scale at which suppressed misalignment is tested.

    Margins have no default because they depend on the instrument: the rates of chance and of the base model
    differ between a toy world with six answers and judged text.

    Attributes:
        rise: Difference above which one rate is noticeably higher than another.
        narrow: Rate below which there are no noticeable bad answers.
        hidden_scale: Scale at which a solution may show bad answers that it hides at scale 1. For sampled rates,
            one scale must be chosen in advance: noise alone raises the maximum over several scales.
        exact_rates: Whether rates are computed exactly instead of sampled. The highest rate of all coherent scales
            is then tested if `hidden_scale` is not set.
    """

    rise: float | None = None
    narrow: float | None = None
    hidden_scale: float | None = None
    exact_rates: bool = False

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Rules":
        """Read the rules from the measurements."""
        rows = frame[frame["role"] == STUDY]
        values = dict(zip(rows["quantity"].str.removeprefix(_PREFIX), rows["value"], strict=True))
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**{**known, "exact_rates": bool(known.get("exact_rates", False))})

    def rows(self) -> list[Mapping[str, object]]:
        """Return the rules as rows of the measurements."""
        place = {"run": STUDY, "arm": "", "role": STUDY, "adapter": "-", "world": "-", "seed": 0, "step": 0}
        return [
            {**place, "quantity": f"{_PREFIX}{name}", "value": float(value), "protocol": ""}
            for name, value in asdict(self).items()
            if value not in (None, False)
        ]

    def margin(self, name: str) -> float:
        """Return the margin `rise` or `narrow`.

        Raises:
            MissingError: If the study does not set it.
        """
        value = getattr(self, name)
        if value is None:
            raise MissingError(f"the study names no margin: set claims.{name} in its file")
        return float(value)
