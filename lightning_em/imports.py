"""What a config may import: our own classes and a few of Lightning's and torch's; other packages by name only."""

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
    """Let configs name classes of the allowed packages and of no others; a denied one is never imported.

    Args:
        names: Packages to allow beside `ALWAYS_ALLOWED` and the entry points of installed plug-ins.

    Raises:
        ValueError: If a name is no import path.
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
    """Packages that an installed distribution offers by an entry point of the group `lightning_em.plugins`."""
    return sorted({point.module for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)})


def allowed() -> list[str]:
    """Packages that were allowed beside the usual ones, for the record."""
    return sorted({*_named, *installed_plugins()})


def as_args() -> list[str]:
    """The same as arguments for the command line of another process."""
    return [f"--allow_import={name}" for name in allowed()]


def take(args: Sequence[str]) -> list[str]:
    """Apply every `--allow_import NAME` of a command line, and no others; returns the other arguments.

    Raises:
        ValueError: If a name is missing or is no import path.
    """
    names, rest = split(args)
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
