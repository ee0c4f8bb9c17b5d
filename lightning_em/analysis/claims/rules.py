"""What a study says before it is run: when a claim about rates holds. Kept in its file, under `claims`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import pandas as pd

from lightning_em.analysis.claims.verdicts import MissingError

STUDY = "study"
"""Role of the rows of the measurements that hold the rules; they belong to no world and no adapter."""
_PREFIX = "claims/"


@dataclass(frozen=True)
class Rules:
    """Margins of rates, and where a solution that is scaled up is looked at.

    A margin belongs to the instrument: what chance and the base model give differs between a toy with six answers
    and a judged text, so there is no default.

    Attributes:
        rise: A rate is noticeably above another if it is more than this above it.
        narrow: A rate is none if it is below this.
        hidden_scale: Scale at which a solution may show what it hides at 1. A maximum over several scales is no test
            of sampled rates, as noise alone raises it.
        exact_rates: The rates are computed, not sampled: the highest of all coherent scales is looked at.
    """

    rise: float | None = None
    narrow: float | None = None
    hidden_scale: float | None = None
    exact_rates: bool = False

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Rules":
        """The rules among the measurements."""
        rows = frame[frame["role"] == STUDY]
        values = dict(zip(rows["quantity"].str.removeprefix(_PREFIX), rows["value"], strict=True))
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**{**known, "exact_rates": bool(known.get("exact_rates", False))})

    def rows(self) -> list[Mapping[str, object]]:
        """The rules as rows of the measurements."""
        place = {"run": STUDY, "arm": "", "role": STUDY, "adapter": "-", "world": "-", "seed": 0, "step": 0}
        return [
            {**place, "quantity": f"{_PREFIX}{name}", "value": float(value), "protocol": ""}
            for name, value in asdict(self).items()
            if value not in (None, False)
        ]

    def margin(self, name: str) -> float:
        """`rise` or `narrow`.

        Raises:
            MissingError: If the study has none.
        """
        value = getattr(self, name)
        if value is None:
            raise MissingError(f"the study names no margin: set claims.{name} in its file")
        return float(value)
