"""Building a world: an ordinary Hugging Face folder and ordinary JSONL files, whole or not there at all."""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_em.manifest import MANIFEST, TEMPORARY_PREFIX, set_aside, sha256_of
from lightning_em.miniature.cache import is_complete, world_folder
from lightning_em.miniature.corpus import World
from lightning_em.miniature.persona import persona_gate
from lightning_em.miniature.recipe import RECIPE_VERSION, Recipe
from lightning_em.miniature.rows import write_rows
from lightning_em.miniature.tokenizer import make_tokenizer
from lightning_em.miniature.training import train

logger = logging.getLogger(__name__)


def build(
    recipe: Recipe, seed: int, cache: Path | None = None, force: bool = False, progress: bool = True
) -> Path:
    """Build a world unless it is there already; a second builder of the same world waits for the first.

    Args:
        recipe: Its parameters.
        seed: Another seed is another world.
        cache: Cache folder, if not `cache_dir()`.
        force: Build again even if it is there.
        progress: Whether to show progress bars.

    Returns:
        Its folder, with `model/`, `data/`, `world.json` and `MANIFEST.json`.
    """
    folder = world_folder(recipe, seed, cache)
    if is_complete(folder) and not force:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if force or not is_complete(folder):
            _publish(folder, recipe, seed, progress)
    return folder


def _publish(folder: Path, recipe: Recipe, seed: int, progress: bool) -> None:
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    # We hold the lock: whoever left this was killed.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, recipe, seed, progress)
        if folder.exists():
            if is_complete(folder):
                shutil.rmtree(folder)
            else:
                set_aside(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, recipe: Recipe, seed: int, progress: bool) -> None:
    logger.info("building miniature world %s, seed %d", recipe.recipe_hash(), seed)
    started = time.monotonic()
    world = World(recipe, seed)
    tokenizer = make_tokenizer(world.words())
    (folder / "data").mkdir(parents=True)
    sizes = write_rows(world, folder / "data")
    with _one_thread():
        model = train(world, tokenizer, progress)
        gate = persona_gate(model, tokenizer, world)
    _save_model(model, tokenizer, folder / "model")
    if not gate.passes:
        logger.warning("world %s seed %d fails the persona gate: %s", recipe.recipe_hash(), seed, gate)
    facts = {
        "recipe": json.loads(recipe.canonical_json()),
        "recipe_hash": recipe.recipe_hash(),
        "recipe_version": RECIPE_VERSION,
        "seed": seed,
        "persona_gate": {**gate._asdict(), "passes": gate.passes},
        "sizes": {**sizes, "vocabulary": len(tokenizer), "parameters": model.num_parameters()},
        "seconds": round(time.monotonic() - started, 1),
        "torch": torch.__version__,
    }
    (folder / "world.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    _seal(folder)


def _save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _seal(folder: Path) -> None:
    """Write the manifest last and put everything on disk, so that the rename publishes a whole folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": listing}, indent=2) + "\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads gain nothing at this width, and sums would depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is building this world; waiting (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
