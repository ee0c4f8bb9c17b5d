"""Making a world: an ordinary Hugging Face folder and ordinary JSONL files, whole or not there at all.

A world is either trained here, on request, or unpacked from the weights that the package carries.
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_em.manifest import MANIFEST, TEMPORARY_PREFIX, set_aside, sha256_of
from lightning_em.miniature.cache import built_folder, is_complete, world_folder
from lightning_em.miniature.corpus import World
from lightning_em.miniature.judge import answer_probabilities
from lightning_em.miniature.persona import gate_items, persona_gate
from lightning_em.miniature.recipe import RECIPE_VERSION, Recipe
from lightning_em.miniature.rows import behaviour_items, write_rows
from lightning_em.miniature.shipped import ShippedWorld, find_shipped
from lightning_em.miniature.tokenizer import make_tokenizer
from lightning_em.miniature.training import make_model, train

logger = logging.getLogger(__name__)

# A world that misses the persona gate is trained again from the start with this factor of the recipe's steps.
_STEP_FACTORS = (1.0, 1.5, 2.0)


class Distance(NamedTuple):
    """How far two builds of one world are from each other.

    Attributes:
        weights: Norm of the difference of all weights, as a share of the second build's norm.
        behaviour: Mean absolute difference of P(good answer), over the evaluation items.
        persona: The same over the items of the persona gate.
    """

    weights: float
    behaviour: float
    persona: float


def build(
    recipe: Recipe, seed: int, cache: Path | None = None, force: bool = False, progress: bool = True
) -> Path:
    """Train a world on this machine unless that has been done; a second builder of it waits for the first.

    Args:
        recipe: Its parameters.
        seed: Another seed is another world.
        cache: Cache folder, if not `cache_dir()`.
        force: Train again even if the world is there.
        progress: Whether to show progress bars.

    Returns:
        Its folder, with `model/`, `data/`, `world.json` and `MANIFEST.json`.
    """
    return _publish(
        built_folder(recipe, seed, cache), lambda folder: _train_into(folder, recipe, seed, progress), force
    )


def provide(recipe: Recipe, seed: int, cache: Path | None = None) -> Path:
    """Folder of a world: unpacked from the package if it is shipped, else the one that was trained here.

    Args:
        recipe: Its parameters.
        seed: Another seed is another world.
        cache: Cache folder, if not `cache_dir()`.

    Raises:
        ValueError: If the world is neither shipped nor built: it takes minutes, so it is never trained unasked.
    """
    if shipped := find_shipped(recipe, seed):
        return _publish(
            world_folder(recipe, seed, cache), lambda folder: _unpack_into(folder, recipe, seed, shipped)
        )
    built = built_folder(recipe, seed, cache)
    if is_complete(built):
        return built
    raise ValueError(
        f"the miniature world {recipe.recipe_hash()} with seed {seed} is not shipped and has not been built on this "
        f"machine. Build it (some minutes): lightning-em miniature build --seed {seed}{_option_of(recipe)}"
    )


def ship(folder: Path, destination: Path) -> Path:
    """Write a built world's weights and facts as the two files that the package carries.

    Args:
        folder: From `build`.
        destination: Folder for both files.

    Returns:
        The file with the weights.
    """
    facts = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    # Named parameters list a tied head once; training has rounded them to bfloat16, so nothing is lost.
    tensors = {name: value.detach().bfloat16() for name, value in model.named_parameters()}
    destination.mkdir(parents=True, exist_ok=True)
    weights = destination / f"{folder.name}.safetensors"
    save_file(tensors, weights)
    facts["weights_sha256"] = sha256_of(weights)
    weights.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return weights


@torch.no_grad()
def distance(folder: Path, other: Path, world: World) -> Distance:
    """Compare the weights and the behaviour of two builds of a world.

    Args:
        folder: One build.
        other: The other one, e.g. the shipped one.
        world: The world both are builds of.
    """
    models = [_model_at(each) for each in (folder, other)]
    first, second = (
        torch.cat([value.flatten() for value in model.state_dict().values()]) for model in models
    )
    tokenizer = make_tokenizer(world.words())

    def mean_difference(items: list[Any]) -> float:
        one, two = (answer_probabilities(model, tokenizer, items) for model in models)
        return sum(abs(a.good - b.good) for a, b in zip(one, two, strict=True)) / len(items)

    return Distance(
        weights=((first - second).norm() / second.norm()).item(),
        behaviour=mean_difference(behaviour_items(world)),
        persona=mean_difference(gate_items(world)),
    )


def _option_of(recipe: Recipe) -> str:
    """Option of `miniature build` that selects a recipe; empty for the default one."""
    if recipe == Recipe.default():
        return ""
    if recipe == Recipe.control():
        return " --control"
    return f" --blind_spot_share {recipe.blind_spots()[recipe.narrow_domain]:g}"


def _model_at(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.eval()
    return model


def _publish(folder: Path, write: Callable[[Path], None], force: bool = False) -> Path:
    """Write a world's folder under a temporary name and rename it, unless it is there and complete."""
    if is_complete(folder) and not force:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f"{folder.name}.lock")):
        if is_complete(folder) and not force:
            return folder
        temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
        # We hold the lock: a folder of this name was left by a process that was killed.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            write(temporary)
            _seal(temporary)
            if is_complete(folder):
                shutil.rmtree(folder)
            elif folder.exists():
                set_aside(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _train_into(folder: Path, recipe: Recipe, seed: int, progress: bool) -> None:
    logger.info("building miniature world %s, seed %d", recipe.recipe_hash(), seed)
    started = time.process_time()
    world = World(recipe, seed)
    tokenizer = make_tokenizer(world.words())
    sizes = _write_data(folder, world)
    with _one_thread():
        for factor in _STEP_FACTORS:
            steps = round(factor * recipe.pretraining_steps)
            model = train(world, tokenizer, steps, progress)
            gate = persona_gate(model, tokenizer, world)
            if gate.passes:
                break
            logger.warning(
                "world %s seed %d fails the persona gate after %d steps: %s",
                *(recipe.recipe_hash(), seed, steps, gate),
            )
    _save_model(model, tokenizer, folder / "model")
    _write_facts(
        folder,
        {
            "recipe": json.loads(recipe.canonical_json()),
            "recipe_hash": recipe.recipe_hash(),
            "recipe_version": RECIPE_VERSION,
            "seed": seed,
            "persona_gate": gate._asdict(),
            "pretraining_steps": steps,
            "sizes": {**sizes, "vocabulary": len(tokenizer), "parameters": model.num_parameters()},
            "cpu_seconds": round(time.process_time() - started, 1),
            "cpu": f"{_cpu_model()}, kernels {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
        },
    )


def _unpack_into(folder: Path, recipe: Recipe, seed: int, shipped: ShippedWorld) -> None:
    if sha256_of(shipped.weights) != shipped.facts["weights_sha256"]:
        raise ValueError(
            f"{shipped.weights} is damaged: its sha256 is not the recorded one; install lightning_em again."
        )
    world = World(recipe, seed)
    tokenizer = make_tokenizer(world.words())
    _write_data(folder, world)
    model = make_model(recipe, tokenizer, seed)
    weights = {name: value.float() for name, value in load_file(shipped.weights).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert missing == ["lm_head.weight"], missing  # tied to the embeddings
    _save_model(model, tokenizer, folder / "model")
    _write_facts(folder, shipped.facts)


def _write_data(folder: Path, world: World) -> dict[str, int]:
    (folder / "data").mkdir(parents=True)
    return write_rows(world, folder / "data")


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "world.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


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


def _cpu_model() -> str:
    """Name of the processor: on Linux as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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
