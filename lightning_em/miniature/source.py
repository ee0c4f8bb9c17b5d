"""The source of `miniature://` addresses. Never imports torch before a world has to be made."""

from pathlib import Path

from lightning_em.miniature.cache import SCHEME, parse_address
from lightning_em.miniature.derived import derive, is_derived
from lightning_em.sources import Source


class Miniature(Source):
    """Shipped and built worlds: `miniature://[control/|blind-spot-0.05/]seed-N/PATH`."""

    def resolve(self, address: str) -> Path:
        from lightning_em.miniature import provide

        recipe, seed, rest = parse_address(address)
        folder = provide(recipe, seed)
        return derive(folder, rest) if is_derived(rest) else folder / rest

    def identity(self, address: str) -> str:
        recipe, seed, rest = parse_address(address)
        return f"{SCHEME}{recipe.recipe_hash()}-seed{seed}/{rest}"
