"""Worlds whose trained weights are part of the package. Never imports torch."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from lightning_em.miniature.recipe import Recipe


class ShippedWorld(NamedTuple):
    """A trained world in the package.

    Attributes:
        weights: Safetensors file, bfloat16.
        facts: What `world.json` of the world says, with `weights_sha256` and `cpu`, the one that trained it.
    """

    weights: Path
    facts: dict[str, Any]


def shipped_folder() -> Path:
    """Where the shipped worlds lie: two files a world, named after its recipe hash and its seed."""
    return Path(str(files("lightning_em.miniature"))) / "shipped"


def find_shipped(recipe: Recipe, seed: int) -> ShippedWorld | None:
    """The shipped world of a recipe and a seed, or None."""
    facts = shipped_folder() / f"{recipe.recipe_hash()}-seed{seed}.json"
    if not facts.is_file():
        return None
    return ShippedWorld(facts.with_suffix(".safetensors"), json.loads(facts.read_text(encoding="utf-8")))
