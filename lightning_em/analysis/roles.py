"""Roles of the arms of a study. Claims and tables refer to roles; a study file may define further ones."""

from collections.abc import Mapping
from typing import NamedTuple


class Role(NamedTuple):
    """One role.

    Attributes:
        level: Format string for the level of an arm.
        shown_as: Name in tables, if it differs from the role's name.
        rate: Rate of the answers that the role's arms are trained to give.
    """

    level: str = "KL weight {:.3g}"
    shown_as: str | None = None
    rate: str = "bad_rate"


ROLES: Mapping[str, Role] = {
    "general": Role(),
    "narrow": Role(),
    "narrow_weight": Role(
        shown_as="narrow"
    ),  # same training as `narrow`, at KL weights other than the compared one
    "reverted": Role(),
    "reverse": Role(),
    "mixed_other": Role("{:.3g} bad"),
    "mixed_domain": Role("{:.3g} bad"),
    "few_rows": Role("{:.3g} rows"),
    "kl_on_narrow": Role(),
    "harmless_general": Role(rate="style_rate"),
    "harmless_narrow": Role(rate="style_rate"),
}
KL_WEIGHT_ROLES = ("general", "narrow_weight", "narrow")
"""Roles that share one training setup and differ in the KL weight, which is 0 for the general run."""


def role_named(name: str) -> Role:
    """Return the role of this name; roles that a study defines itself have a generic level format."""
    return ROLES.get(name, Role("level {:.3g}"))
