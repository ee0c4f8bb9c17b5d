"""What the arms of a study are for. Claims and tables are made of roles; a study's file may name more of its own."""

from collections.abc import Mapping
from typing import NamedTuple


class Role(NamedTuple):
    """One role.

    Attributes:
        level: How the level of its arms is written.
        shown_as: Name in tables, if it is another one.
        rate: The rate of answers that its arms are trained for.
    """

    level: str = "KL weight {:.3g}"
    shown_as: str | None = None
    rate: str = "bad_rate"


ROLES: Mapping[str, Role] = {
    "general": Role(),
    "narrow": Role(),
    "narrow_weight": Role(
        shown_as="narrow"
    ),  # the same training at another KL weight than the one that is compared
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
"""The same training at several KL weights, 0 for the general run."""


def role_named(name: str) -> Role:
    """What is known of a role; a study's own has levels without a meaning."""
    return ROLES.get(name, Role("level {:.3g}"))
