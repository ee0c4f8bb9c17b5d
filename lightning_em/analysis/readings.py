"""Readings: the records and metrics of one run as named numbers, with the names that claims use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lightning_em.analysis.frames import metrics_frame, records_frame
from lightning_em.runs import RunFolder

FOLLOWED_KINDS = ("narrow_seen", "narrow_held_out", "kl_domain", "held_out_domain")
"""Kinds of question for which the bad rate at scale 1 is kept at every checkpoint."""
_UNDER_NOISE = ("ce_increase", "lost_gain", "relative_increase", "displacement")


class Reading(NamedTuple):
    """One number of a run at one checkpoint.

    Attributes:
        step: Step of the checkpoint.
        quantity: Name of the quantity.
        value: Value of the quantity.
        protocol: Protocol of the measurement (see `protocol_of`); empty if the checkpoint alone determines the value.
    """

    step: int
    quantity: str
    value: float
    protocol: str = ""


def readings(run: RunFolder) -> list[Reading]:
    """Return all numbers of a run: each probe's at its last step, and some quantities at every step.

    A curve comes from one record: coordinates that only an earlier step, or an earlier record of the same step,
    has are left out. The effective norm, the bad rates at scale 1 of `FOLLOWED_KINDS`, the gradient norms and the
    validation losses are kept at every step.

    Names, with `@` before the coordinate on a grid:
        `bad_rate/<kind>@<scale>`, and likewise `good_rate`, `other_rate`, `style_rate`.
        `ce@<scale>`, `best_scale`, `best_ce`, `optimum_inside_grid`, `effective_norm`.
        `efficiency` = (L_base - L) / norm^2, `loss_over_norm2` = L / norm^2.
        `perturbation/<ce_increase | lost_gain | relative_increase | displacement>@<strength>`, means over the noise.
        `kl_chat/<prompts>@<scale>`.
        `significance/<adapter | random>@<share of the trained norm>`, means over the random draws.
        `ce_gradient_norm`, `kl_gradient_norm`.
        `margin/<kind>@<scale>`, `bad_preferred/<kind>@<scale>`.
        `val/ce`, `val/kl`.
    """
    found = _from_records(records_frame(run)) + _from_metrics(run)
    return sorted(found + _efficiency(found))


def _is_followed(quantity: str) -> bool:
    if quantity in ("effective_norm", "val/ce", "val/kl", "ce_gradient_norm", "kl_gradient_norm"):
        return True
    return quantity in {f"bad_rate/{kind}@1" for kind in FOLLOWED_KINDS}


def _from_records(records: pd.DataFrame) -> list[Reading]:
    """Return the last measurement of each probe at the kept steps; draws at the same coordinate are averaged."""
    named: dict[tuple[int, str, str], list[float]] = {}
    last = records.groupby("probe")["step"].max()
    newest = records.groupby(["probe", "step"])["measurement"].transform("max")
    for found in records[records["measurement"] == newest].to_dict("records"):
        row = {str(column): value for column, value in found.items()}
        name = _NAMES[row["probe"]](row) if row["probe"] in _NAMES else None
        if name is not None and (row["step"] == last[row["probe"]] or _is_followed(name)):
            protocol = "" if name == "effective_norm" else row["protocol"]
            named.setdefault((row["step"], name, protocol), []).append(row["value"])
    return [
        Reading(step, name, sum(values) / len(values), protocol)
        for (step, name, protocol), values in named.items()
    ]


def _from_metrics(run: RunFolder) -> list[Reading]:
    """Return the validation losses."""
    frame = metrics_frame(run)
    known = [frame[name].dropna() for name in ("val/ce", "val/kl") if name in frame]
    return [
        Reading(int(step), str(column.name), float(value))
        for column in known
        for step, value in zip(column.index, column, strict=True)
    ]


def _efficiency(found: Sequence[Reading]) -> list[Reading]:
    named = {(reading.step, reading.quantity): reading for reading in found}
    made = []
    for (step, quantity), norm in named.items():
        base, trained = named.get((step, "ce@0")), named.get((step, "ce@1"))
        if quantity == "effective_norm" and base and trained and norm.value > 0:
            drop, square = base.value - trained.value, norm.value**2
            made.append(Reading(step, "efficiency", drop / square, trained.protocol))
            made.append(Reading(step, "loss_over_norm2", trained.value / square, trained.protocol))
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
    # only the means over noise seeds (`<name>_mean`), not the values of single seeds
    name = str(row["quantity"]).removesuffix("_mean")
    summed_up = name != row["quantity"] and name in _UNDER_NOISE
    return f"perturbation/{name}@{row['strength']:g}" if summed_up else None


def _chat_kl(row: Mapping[str, Any]) -> str | None:
    if row["quantity"] != "kl":
        return None
    return f"kl_chat/{row['prompts']}@{row['scale']:g}"


def _significance(row: Mapping[str, Any]) -> str | None:
    return f"significance/{row['direction']}@{row['norm_ratio']:g}" if row["quantity"] == "kl" else None


def _gradient(row: Mapping[str, Any]) -> str | None:
    # points with the coordinate `tensor` are norms of single tensors
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
