"""The miniature world: the embedded default, in which narrow and general solutions are real."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_em.miniature.cache import (
    SCHEME,
    built_folder,
    is_complete,
    parse_address,
    world_folder,
)
from lightning_em.miniature.recipe import RECIPE_VERSION, DomainKind, Recipe
from lightning_em.miniature.shipped import find_shipped

_PROBES = ("Behaviour", "Preference", "Significance")


def provide(recipe: Recipe, seed: int) -> Path:
    """Folder of a shipped or built world; see `lightning_em.miniature.building.provide`."""
    # Asked first, for it needs no torch.
    folder = world_folder(recipe, seed) if find_shipped(recipe, seed) else built_folder(recipe, seed)
    if is_complete(folder):
        return folder
    from lightning_em.miniature.building import provide as provide_now

    return provide_now(recipe, seed)


def build(
    recipe: Recipe, seed: int, cache: Path | None = None, force: bool = False, progress: bool = True
) -> Path:
    """Train a world on this machine; see `lightning_em.miniature.building.build`."""
    from lightning_em.miniature.building import build as build_now

    return build_now(recipe, seed, cache, force, progress)


def __getattr__(name: str) -> Any:
    """Import a probe on first access, so that reading an address loads no torch."""
    if name not in _PROBES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)


__all__ = [
    "RECIPE_VERSION",
    "SCHEME",
    "Behaviour",
    "DomainKind",
    "Preference",
    "Recipe",
    "Significance",
    "build",
    "built_folder",
    "find_shipped",
    "parse_address",
    "provide",
    "world_folder",
]
