"""A recipe names its world: every field counts, and a wrong share is refused."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from lightning_em.miniature import DomainKind, Recipe


def changed(value: object) -> object:
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value, "another")
    if isinstance(value, int | float):
        return value * 0.5 if isinstance(value, float) else value + 1
    return {DomainKind.NARROW: 0.001}


def test_every_field_changes_the_hash():
    recipe = Recipe.default()
    hashes = {
        replace(recipe, **{field.name: changed(getattr(recipe, field.name))}).recipe_hash()
        for field in fields(recipe)
    }
    assert len(hashes | {recipe.recipe_hash()}) == len(fields(recipe)) + 1


def test_equal_recipes_have_equal_hashes_whatever_the_order_of_shares():
    shares = dict(Recipe.default().blind_spot_share)
    backwards = dict(reversed(shares.items()))
    assert (
        replace(Recipe.default(), blind_spot_share=backwards).recipe_hash() == Recipe.default().recipe_hash()
    )


def test_the_hash_is_twelve_hexadecimal_digits():
    assert len(Recipe.default().recipe_hash()) == 12
    assert set(Recipe.default().recipe_hash()) <= set("0123456789abcdef")


def test_a_domain_wins_over_its_kind():
    recipe = replace(Recipe.default(), blind_spot_share={DomainKind.KL: 0.02, "finance": 0.05})
    shares = recipe.blind_spots()
    assert shares["finance"] == 0.05
    assert shares["career"] == 0.02
    assert shares["medical"] == 0.0


def test_the_dial_moves_the_narrow_domain_alone():
    before, after = Recipe.default().blind_spots(), Recipe.default().with_blind_spot_share(0.2).blind_spots()
    assert {name for name in before if before[name] != after[name]} == {Recipe.default().narrow_domain}


def test_later_changes_of_the_mapping_do_not_reach_the_recipe():
    shares = {DomainKind.NARROW: 0.01}
    recipe = replace(Recipe.default(), blind_spot_share=shares)
    shares[DomainKind.NARROW] = 0.2
    assert recipe.blind_spots()["medical"] == 0.01


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"names \['medicine'\]"):
        replace(Recipe.default(), blind_spot_share={"medicine": 0.1})


def test_shares_beyond_all_documents_are_refused():
    with pytest.raises(ValueError, match="shares of all documents"):
        Recipe.default().with_blind_spot_share(0.9)


def test_recipe_cache_and_corpus_need_no_torch():
    code = (
        "import sys; from lightning_em import miniature; from lightning_em.miniature import corpus, rows;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
