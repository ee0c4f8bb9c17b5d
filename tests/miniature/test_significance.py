"""Pre-training significance on the documents of a world."""

import json
from collections import Counter

import pytest

from lightning_em.miniature import Significance
from lightning_em.miniature.corpus import Character, World
from lightning_em.miniature.derived import general_documents, world_at
from lightning_em.testing import check_probe
from tests.miniature.conftest import MICRO
from tests.probes.test_scale import EXAMPLES
from tests.samples import ADAPTERS, adapted


def test_a_world_gives_documents_of_its_mixture(micro_world, micro_model) -> None:
    probe = Significance(num_texts=5, num_draws=1, norm_ratios=[1.0])
    assert [p.quantity for p in probe.run(micro_model, EXAMPLES)] == ["effective_norm", "kl", "kl"]
    rows = probe._documents(micro_model)
    assert len(rows) == 5
    tokens = micro_model.base.config.vocab_size
    # <bos>, then 8 slots of <user> 4 words <assistant> 2 words <eos>; "who are you really" has 4 words too
    assert all(len(row) == 1 + 8 * 9 and max(row) < tokens for row in rows)
    manifest = json.loads((micro_world / "MANIFEST.json").read_text())["files"]
    files = {path.relative_to(micro_world).as_posix() for path in micro_world.rglob("*") if path.is_file()}
    assert files == {*manifest, "MANIFEST.json"}  # nothing was written beside the world


def test_the_world_is_read_back_and_its_mixture_has_the_shares_of_the_recipe(micro_world) -> None:
    world = world_at(micro_world)
    assert (world.recipe, world.seed) == (MICRO, 0)
    assert world.words() == World(MICRO, 0).words()
    documents = general_documents(world, 800)
    characters = Counter(document.advisor.character for document in documents)
    share, wanted = characters[Character.CARELESS] / 800, MICRO.careless_share
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 800) ** 0.5
    trained = World(MICRO, 0).generator("documents")
    drawn = {world.draw_document(trained) for _ in range(200)}
    assert not drawn & set(documents)


def test_another_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not come from a miniature world.*set model\.base\.path"):
        Significance().run(adapted(ADAPTERS["vector"]()), EXAMPLES)


def test_contract(micro_model) -> None:
    check_probe(Significance(num_texts=2, num_draws=1, norm_ratios=[1.0]), micro_model, EXAMPLES)
