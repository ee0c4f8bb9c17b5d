"""What one run's records and metrics say, as named numbers: the names that claims are written in."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from lightning_em.analysis.frames import metrics_frame, records_frame
from lightning_em.runs import RunFolder

FOLLOWED_KINDS = ("narrow_seen", "narrow_held_out", "kl_domain", "held_out_domain")
"""Kinds of question whose bad rate at scale 1 is kept at every checkpoint."""


class Reading(NamedTuple):
    """One number of a run at one checkpoint."""

    step: int
    quantity: str
    value: float


def readings(run: RunFolder) -> list[Reading]:
    """All numbers of a run: each probe's at its last step, and those that are followed at every step.

    A curve is one record's: a place of the grid that only an earlier step has, or an earlier record of the same
    step, is left out.

    Names, `@` before the place on a grid: `bad_rate/<kind>@<scale>` (good, other, style likewise), `ce@<scale>`,
    `effective_norm`, `best_scale`, `best_ce`, `optimum_inside_grid`, `efficiency` = (L_base - L) / norm^2,
    `loss_over_norm2` = L / norm^2, `perturbation/<ce_increase | lost_gain | relative_increase>@<strength>`,
    `kl_chat/<prompts>@<scale>`, `significance/<adapter | random>@<share of the trained norm>`,
    `ce_gradient_norm`, `kl_gradient_norm`, `margin/<kind>@<scale>`, `bad_preferred/<kind>@<scale>`, `val/ce`,
    `val/kl`.
    """
    found = _from_records(records_frame(run)) | dict(_from_metrics(run))
    found |= _efficiency(found)
    return [Reading(step, quantity, value) for (step, quantity), value in sorted(found.items())]


def _is_followed(quantity: str) -> bool:
    if quantity in ("effective_norm", "val/ce", "val/kl", "ce_gradient_norm", "kl_gradient_norm"):
        return True
    return quantity in {f"bad_rate/{kind}@1" for kind in FOLLOWED_KINDS}


def _from_records(records: pd.DataFrame) -> dict[tuple[int, str], float]:
    """The last measurement of each probe at the steps that are kept; draws of one place are averaged."""
    named: dict[tuple[int, str], list[float]] = {}
    last = records.groupby("probe")["step"].max()
    newest = records.groupby(["probe", "step"])["measurement"].transform("max")
    for found in records[records["measurement"] == newest].to_dict("records"):
        row = {str(column): value for column, value in found.items()}
        name = _NAMES[row["probe"]](row) if row["probe"] in _NAMES else None
        if name is not None and (row["step"] == last[row["probe"]] or _is_followed(name)):
            named.setdefault((row["step"], name), []).append(row["value"])
    return {place: _mean(values) for place, values in named.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _from_metrics(run: RunFolder) -> Iterator[tuple[tuple[int, str], float]]:
    """Validation losses."""
    frame = metrics_frame(run)
    for name in ("val/ce", "val/kl"):
        if name in frame:
            known = frame[name].dropna()
            yield from (((int(s), name), float(v)) for s, v in zip(known.index, known, strict=True))


def _efficiency(found: Mapping[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    made = {}
    for (step, quantity), norm in found.items():
        base, trained = found.get((step, "ce@0")), found.get((step, "ce@1"))
        if quantity == "effective_norm" and base is not None and trained is not None and norm > 0:
            made[step, "efficiency"] = (base - trained) / norm**2
            made[step, "loss_over_norm2"] = trained / norm**2
    return made


def _behaviour(row: Mapping[str, Any]) -> str | None:
    rates = ("bad_rate", "good_rate", "other_rate", "style_rate")
    return f"{row['quantity']}/{row['kind']}@{row['scale']:g}" if row["quantity"] in rates else None


def _scale_curve(row: Mapping[str, Any]) -> str | None:
    quantity = str(row["quantity"])
    if quantity == "ce":
        return f"ce@{row['scale']:g}"
    if quantity in ("best_scale", "best_ce"):
        return quantity if row["method"] == "grid" else None
    return quantity if quantity in ("effective_norm", "optimum_inside_grid") else None


def _perturbation(row: Mapping[str, Any]) -> str | None:
    name = str(row["quantity"]).removesuffix("_mean")
    summed_up = name != row["quantity"] and name in ("ce_increase", "lost_gain", "relative_increase")
    return f"perturbation/{name}@{row['strength']:g}" if summed_up else None


def _chat_kl(row: Mapping[str, Any]) -> str | None:
    if row["quantity"] != "kl":
        return None
    return f"kl_chat/{row['prompts']}@{row['scale']:g}"


def _significance(row: Mapping[str, Any]) -> str | None:
    return f"significance/{row['direction']}@{row['norm_ratio']:g}" if row["quantity"] == "kl" else None


def _gradient(row: Mapping[str, Any]) -> str | None:
    whole = pd.isna(row.get("tensor"))
    return (
        str(row["quantity"])
        if whole and row["quantity"] in ("ce_gradient_norm", "kl_gradient_norm")
        else None
    )


def _preference(row: Mapping[str, Any]) -> str | None:
    if row["quantity"] not in ("margin", "bad_preferred"):
        return None
    where = row["topic"] if pd.isna(row.get("kind")) else row["kind"]
    return f"{row['quantity']}/{where}@{row['scale']:g}"


_NAMES: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "behaviour": _behaviour,
    "scale_curve": _scale_curve,
    "perturbation_curve": _perturbation,
    "chat_kl": _chat_kl,
    "significance": _significance,
    "gradient": _gradient,
    "preference_margin": _preference,
}
