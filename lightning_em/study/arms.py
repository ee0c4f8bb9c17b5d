"""Read and check the arms of a study file. Never imports torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

from lightning_em.analysis.cells import DEFAULT_WORLD
from lightning_em.analysis.claims.rules import Difference, Rules
from lightning_em.analysis.claims.specs import CLAIMS
from lightning_em.analysis.pairs import SOLUTIONS
from lightning_em.analysis.roles import ROLES
from lightning_em.records import TABLE_COLUMNS
from lightning_em.study.section import Section, refuse_unknown

ADAPTER_KEYS = ("config", "set")
ARM_KEYS = (
    "role", "level", "init_from", "config", "set", "probing", "adapters", "worlds", "seeds", "per_adapter",
)  # fmt: skip
PER_ADAPTER_KEYS = ("level", "config", "set", "probing")
NAME = re.compile(r"[A-Za-z0-9_.]+")


class Arm(NamedTuple):
    """One arm of a study.

    Attributes:
        name: Key of the arm in the file.
        section: Settings of the arm in the file.
        init_from: Name of the arm whose adapter this one starts from; None for a fresh adapter.
        adapters: Names of the adapters that the arm is run with.
        worlds: Names of the worlds that the arm is run in.
        seeds: Training seeds that the arm is run with.
    """

    name: str
    section: Section
    init_from: str | None
    adapters: list[str]
    worlds: list[str]
    seeds: list[int]


def read_arms(top: Section) -> dict[str, Arm]:
    """Read the arms of a study, by name.

    Raises:
        ValueError: If a setting is not valid; the message names file and key.
    """
    adapters, arms = top.sections("adapters"), top.sections("arms")
    for key, found in (("adapters", adapters), ("arms", arms)):
        if not found:
            top.refuse(key, "a mapping with one entry or more")
    for each in adapters.values():
        each.only(ADAPTER_KEYS)
    for key, names in (("adapters", list(adapters)), ("worlds", list(worlds_of(top)))):
        if wrong := [name for name in names if not NAME.fullmatch(name.replace("-", "_"))]:
            raise ValueError(f"{top.file}: {key}: {wrong[0]!r} must be letters, digits, . _ and -.")
    seeds = top.integers("seeds") or top.refuse("seeds", "a list of different whole numbers")
    # Runs of a role that no claim reads are measured and shown too. The file must list such roles under `roles`, so
    # that a typo in an arm's `role` is an error.
    roles = [*ROLES, *(top.texts("roles") or ())]
    return {
        name: _arm(name, each, list(adapters), worlds_of(top), seeds, arms, roles)
        for name, each in arms.items()
    }


def _arm(
    name: str,
    section: Section,
    adapters: list[str],
    worlds: Mapping[str, str],
    seeds: list[int],
    arms: Mapping[str, Section],
    roles: Sequence[str],
) -> Arm:
    section.only(ARM_KEYS)
    if not NAME.fullmatch(name):
        raise ValueError(f"{section.file}: arm {name!r} must be letters, digits, dots and underscores.")
    refuse_unknown(section.text("role") or "", roles, f"{section.file}: {section.place}.role is")
    init_from = section.text("init_from")
    if init_from is not None:
        refuse_unknown(init_from, arms, f"{section.file}: {section.place}.init_from names arm")
    for adapter, own in section.sections("per_adapter").items():
        refuse_unknown(adapter, adapters, f"{section.file}: {section.place}.per_adapter names")
        own.only(PER_ADAPTER_KEYS)
    chosen = section.texts("adapters") or adapters
    in_worlds = section.texts("worlds") or [next(iter(worlds))]
    for key, given, known in (("adapters", chosen, adapters), ("worlds", in_worlds, list(worlds))):
        for each in given:
            refuse_unknown(each, known, f"{section.file}: {section.place}.{key} names")
    return Arm(name, section, init_from, chosen, in_worlds, section.integers("seeds") or seeds)


def worlds_of(top: Section) -> dict[str, str]:
    """Texts that replace {world}, by world name. An arm without `worlds` is run in the first world only."""
    worlds = top.section("worlds")
    return {name: worlds.text(name) or "" for name in worlds.content} or {DEFAULT_WORLD: ""}


def rules_of(top: Section) -> Rules:
    """Read the settings of the claims. A claim that needs a setting that is missing is not measured."""
    claims = top.section("claims")
    claims.only(field.name for field in fields(Rules))
    exact = claims.content.get("exact_rates", False)
    if not isinstance(exact, bool):
        claims.refuse("exact_rates", "true or false")
    rise, narrow, hidden_scale = (claims.number(key) for key in ("rise", "narrow", "hidden_scale"))
    for key, value in (("rise", rise), ("narrow", narrow)):
        if value is not None and not 0 < value < 1:
            claims.refuse(key, "a probability between 0 and 1")
    if hidden_scale is not None and hidden_scale <= 1:
        claims.refuse("hidden_scale", "a scale above 1")
    own = {key: _difference(key, each) for key, each in claims.sections("differences").items()}
    return Rules(rise, narrow, hidden_scale, exact, own)


def _difference(key: str, section: Section) -> Difference:
    if key in CLAIMS:
        raise ValueError(
            f"{section.file}: {section.place} has the key of a claim of the literature: choose another."
        )
    section.only(field.name for field in fields(Difference))
    more = section.text("more") or ""
    refuse_unknown(more, SOLUTIONS, f"{section.file}: {section.place}.more is")
    source, quantity = (
        section.text(name) or section.refuse(name, "a name") for name in ("source", "quantity")
    )
    at = section.section("coordinates").content
    for name, value in at.items():
        if name in TABLE_COLUMNS or isinstance(value, bool) or not isinstance(value, int | float | str):
            section.section("coordinates").refuse(name, "a coordinate of the quantity, a number or a text")
    return Difference(more, source, quantity, at, section.number("margin") or 0.0)


def parents_first(top: Section, arms: Mapping[str, Arm]) -> list[Arm]:
    """Sort the arms so that each comes after the one it starts from; otherwise in the file's order.

    Raises:
        ValueError: If the `init_from` keys form a cycle.
    """
    # The sort is stable, so arms of the same depth keep the order of the file.
    return sorted(arms.values(), key=lambda arm: len(_ancestors(top, arm, arms)))


def _ancestors(top: Section, arm: Arm, arms: Mapping[str, Arm]) -> list[str]:
    chain = [arm.name]
    while (parent := arms[chain[-1]].init_from) is not None:
        if parent in chain:
            raise ValueError(
                f"{top.file}: arms start from each other in a circle: {' <- '.join([*chain, parent])}."
            )
        chain.append(parent)
    return chain
