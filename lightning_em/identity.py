"""What a run is: the part of its config that decides the result, and the name that follows from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_em.launch import num_processes, refuse_control_characters
from lightning_em.miniature import SCHEME, parse_address
from lightning_em.runs import RunFolder

# Settings that say where and how a run is computed, not what it is; everything else names the run.
DEVICE_SETTINGS = {
    "trainer": {
        "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "default_root_dir", "plugins", "deterministic", "benchmark",
    },
    "data": {"num_workers", "validation_batch_size"},
    "model": {"sampling", "backend", "store"},
}  # fmt: skip
# Keys that came later, with the value under which a run is what it was without them: that value renames nothing.
ADDED_KEYS = {
    "reference": "live", "max_tokens": None, "length_buckets": None, "narrow_extra": None, "bad_share": 0.5,
}  # fmt: skip
NOT_PART_OF_A_RUN = {
    "config", "run", "probing", "checkpoint", "ckpt_path", "weights_only", "allow_zero_adapter",
}  # fmt: skip


def run_folder(config: dict[str, Any]) -> RunFolder:
    """The run's folder: named, or the first config file's name and the hash of what the run is.

    Raises:
        ValueError: If a line break hides in it, as in a config that somebody else has written.
    """
    options = config["run"]
    files = config.get("config") or []
    experiment = Path(files[0]).stem if files else "run"
    name = options["name"] or f"{experiment}-{identity_of(config)}"
    refuse_control_characters("run.root, run.name and the name of a config file", options["root"], name)
    return RunFolder(Path(options["root"]) / name)


def what_a_run_is(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides the result; worlds by recipe, which an address does not tell."""
    kept: dict[str, Any] = {}
    for group, value in config.items():
        if group in NOT_PART_OF_A_RUN:
            continue
        drop = DEVICE_SETTINGS.get(group, set())
        kept[group] = {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
    if isinstance(trainer := kept.get("trainer"), dict):
        kept["trainer"] = trainer | _micro_batches_of_a_step(config["trainer"])
    by_recipe: dict[str, Any] = _by_recipe(_without_added(kept))
    return by_recipe


def _micro_batches_of_a_step(trainer: dict[str, Any]) -> dict[str, int]:
    """Accumulation as on one device: 4 devices that accumulate twice are the run that 1 device makes of 8."""
    processes = num_processes(trainer) or 1
    return (
        {"accumulate_grad_batches": trainer.get("accumulate_grad_batches", 1) * processes}
        if processes > 1
        else {}
    )


def _without_added(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    named = {k: v for k, v in value.items() if k not in ADDED_KEYS or v != ADDED_KEYS[k]}
    return {key: _without_added(each) for key, each in named.items()}


def _by_recipe(value: Any) -> Any:
    """`miniature://seed-0/model` as `miniature://<recipe hash>-seed0/model`: another recipe is another run."""
    if isinstance(value, dict):
        return {key: _by_recipe(each) for key, each in value.items()}
    if isinstance(value, str) and value.startswith(SCHEME):
        recipe, seed, rest = parse_address(value)
        return f"{SCHEME}{recipe.recipe_hash()}-seed{seed}/{rest}"
    return value


def identity_of(config: dict[str, Any]) -> str:
    """Eight hexadecimal characters that stand for the config without device settings."""
    text = json.dumps(what_a_run_is(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf that differs between two configs."""
    old, new = _leaves(what_a_run_is(before)), _leaves(what_a_run_is(now))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix.rstrip("."): config}
    return {k: v for name, value in config.items() for k, v in _leaves(value, f"{prefix}{name}.").items()}
