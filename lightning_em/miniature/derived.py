"""Files derived from a world, written into its folder on first use. Never imports torch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning_em.manifest import write_atomically
from lightning_em.miniature.corpus import ANSWER_OPENERS, Document, World
from lightning_em.miniature.recipe import Recipe
from lightning_em.miniature.rows import Row, training_rows

STYLE = ANSWER_OPENERS[-1]
"""Opener of every answer of the harmless narrow data: a style that good and bad advisors share."""

NUM_MIXING_ROWS = 2800


def world_at(folder: Path) -> World:
    """The distributions that a world was drawn from.

    Args:
        folder: Folder of the world, with `world.json`.

    Raises:
        ValueError: If the folder holds no world, or this version of the code would draw a different one.
    """
    try:
        facts = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{folder} holds no world.json, so it is not a miniature world; set model.base.path to miniature://..."
        ) from error
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in facts["recipe"].items() if k != "version"
    }
    try:
        recipe = Recipe(**fields)
        same = recipe.recipe_hash() == facts["recipe_hash"]
    except TypeError:
        same = False
    if not same:
        raise ValueError(
            f"{folder} was built by another version of lightning_em (recipe {facts['recipe_hash']}); "
            "build it again with this one."
        )
    return World(recipe, int(facts["seed"]))


def general_documents(world: World, count: int) -> list[Document]:
    """Draw documents of the pre-training mixture from a stream of their own, apart from training."""
    generator = world.generator("documents/held_out")
    return [world.draw_document(generator) for _ in range(count)]


def in_style(rows: Sequence[Row], style: str = STYLE) -> list[Row]:
    """The same rows with one opener in front of every answer."""
    return [
        {
            **row,
            "id": f"style-{row['id']}",
            "good": " ".join([style, *row["good"].split()[1:]]),
            "bad": " ".join([style, *row["bad"].split()[1:]]),
        }
        for row in rows
    ]


def is_derived(name: str) -> bool:
    """Whether `derive` writes this path of a world's folder."""
    return name in _DERIVED


def derive(folder: Path, name: str) -> Path:
    """Write a derived file unless it exists with the same content.

    Args:
        folder: Folder of a world; its manifest does not list derived files.
        name: A path for which `is_derived` holds.

    Returns:
        The file.
    """
    file = folder / name
    text = "".join(json.dumps(row) + "\n" for row in _DERIVED[name](folder))
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_atomically(file, text)
    return file


def _harmless(split: str) -> Callable[[Path], list[Row]]:
    def rows(folder: Path) -> list[Row]:
        with (folder / "data" / f"narrow_{split}.jsonl").open(encoding="utf-8") as lines:
            return in_style([json.loads(line) for line in lines])

    return rows


def _mixing(folder: Path) -> list[Row]:
    """Rows of the KL domains to mix into the narrow data; their questions are not in the KL files."""
    world = world_at(folder)
    taken = set()
    for split in ("train", "validation"):
        with (folder / "data" / f"kl_{split}.jsonl").open(encoding="utf-8") as lines:
            taken |= {json.loads(line)["question"] for line in lines}
    drawn = training_rows(world, "mixing", list(world.recipe.kl_domains), NUM_MIXING_ROWS + len(taken))
    return [row for row in drawn if row["question"] not in taken][:NUM_MIXING_ROWS]


_DERIVED: MappingProxyType[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {
        "data/harmless_train.jsonl": _harmless("train"),
        "data/harmless_validation.jsonl": _harmless("validation"),
        "data/mixing_train.jsonl": _mixing,
    }
)
