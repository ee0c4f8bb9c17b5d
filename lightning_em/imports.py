"""Restrict what a config may import: this package, parts of Lightning and torch, and packages allowed by name."""

import importlib.metadata
from collections.abc import Iterable, Sequence

from jsonargparse import set_parsing_settings

PLUGIN_GROUP = "lightning_em.plugins"
ALWAYS_ALLOWED = (
    "lightning_em",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.loggers",
    "lightning.fabric.plugins",
    "torch.optim",
)
_named: set[str] = set()


def restrict(names: Iterable[str] = ()) -> None:
    """Let configs name classes of allowed packages only; a denied package is never imported.

    Args:
        names: Packages to allow in addition to `ALWAYS_ALLOWED` and the entry points of installed plug-ins.

    Raises:
        ValueError: If a name is not an import path.
    """
    names = list(names)
    try:
        set_parsing_settings(
            import_path_denylist=["*"], import_path_allowlist=[*ALWAYS_ALLOWED, *installed_plugins(), *names]
        )
    except ValueError as error:
        raise ValueError(f"--allow_import expects the name of a package, got {names}: {error}") from None
    _named.update(names)


def installed_plugins() -> list[str]:
    """Return the packages that installed distributions offer as entry points of the group `lightning_em.plugins`."""
    return sorted({point.module for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)})


def allowed() -> list[str]:
    """Return the packages that were allowed in addition to the default ones, for the run's record."""
    return sorted({*_named, *installed_plugins()})


def as_args() -> list[str]:
    """Return the allowed packages as command-line arguments for another process."""
    return [f"--allow_import={name}" for name in allowed()]


def take(args: Sequence[str]) -> list[str]:
    """Apply every `--allow_import NAME` of a command line; return the other arguments.

    Raises:
        ValueError: If a name is missing or not an import path.
    """
    names, rest = split(args)
    # jsonargparse keeps what was ever allowed in this process until it is denied by name.
    if dropped := sorted(_named - set(names)):
        set_parsing_settings(import_path_denylist=dropped)
    _named.clear()
    restrict(names)
    return rest


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names given by `--allow_import NAME`, and the other arguments."""
    names: list[str] = []
    rest: list[str] = []
    following = iter(args)
    for arg in following:
        flag, has_value, value = arg.partition("=")
        if flag == "--allow_import":
            names.append(value if has_value else next(following, ""))
        else:
            rest.append(arg)
    return names, rest
