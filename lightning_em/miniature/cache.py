"""Where worlds lie: one folder a recipe and seed under the user's cache folder. Never imports torch."""

import re
from pathlib import Path

from lightning_em.manifest import MANIFEST, manifest_problems
from lightning_em.miniature.recipe import Recipe
from lightning_em.sources import cache_dir

SCHEME = "miniature://"
_ADDRESS = re.compile(
    r"(?:(?P<control>control)/|blind-spot-(?P<share>[0-9.]+)/)?seed-(?P<seed>[0-9]+)(?:/(?P<rest>.+))?"
)


def world_folder(recipe: Recipe, seed: int, cache: Path | None = None) -> Path:
    """Folder of a shipped world; it may not exist yet."""
    return (cache or cache_dir()) / "miniature" / f"{recipe.recipe_hash()}-seed{seed}"


def built_folder(recipe: Recipe, seed: int, cache: Path | None = None) -> Path:
    """Folder of a world that `miniature build` trains on this machine; it may not exist yet."""
    return (cache or cache_dir()) / "miniature" / "built" / f"{recipe.recipe_hash()}-seed{seed}"


def is_complete(folder: Path) -> bool:
    """Whether a world exists and every file matches its manifest."""
    return (folder / MANIFEST).is_file() and not manifest_problems(folder)


def parse_address(address: str) -> tuple[Recipe, int, str]:
    """Recipe, seed and path inside the folder of `miniature://[control/|blind-spot-0.05/]seed-0/model`.

    Raises:
        ValueError: If the address does not have this form.
    """
    match = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if not match:
        raise ValueError(
            f"cannot read {address!r}; expected miniature://seed-N/PATH, miniature://control/seed-N/PATH or "
            "miniature://blind-spot-SHARE/seed-N/PATH, with PATH such as model or data/narrow_train.jsonl."
        )
    recipe = Recipe.control() if match["control"] else Recipe.default()
    if match["share"]:
        recipe = recipe.with_blind_spot_share(float(match["share"]))
    return recipe, int(match["seed"]), match["rest"] or "."
