"""The miniature world: the embedded default, in which narrow and general solutions are real."""

from pathlib import Path

from lightning_em.miniature.cache import SCHEME, cache_dir, parse_address, recipe_hash_at, world_folder
from lightning_em.miniature.derived import derive, is_derived
from lightning_em.miniature.recipe import RECIPE_VERSION, DomainKind, Recipe


def resolve(path: str) -> str | Path:
    """Local path of a `miniature://` path, made on first use; other paths come back as they are.

    Raises:
        ValueError: If a `miniature://` path cannot be read.
    """
    if not path.startswith(SCHEME):
        return path
    recipe, seed, rest = parse_address(path)
    folder = build(recipe, seed)
    return derive(folder, rest) if is_derived(rest) else folder / rest


def build(
    recipe: Recipe, seed: int, cache: Path | None = None, force: bool = False, progress: bool = True
) -> Path:
    """Build a world unless it is there already; see `lightning_em.miniature.building.build`."""
    from lightning_em.miniature.building import build as build_now

    return build_now(recipe, seed, cache, force, progress)


__all__ = [
    "RECIPE_VERSION",
    "SCHEME",
    "DomainKind",
    "Recipe",
    "cache_dir",
    "parse_address",
    "recipe_hash_at",
    "resolve",
    "world_folder",
]
