"""Run identity: the config fields that affect the result, the hashes of the data, and the starting adapter.

The default name of a run ends in a hash of those config fields. The identity adds the data and the start. run.json
records it, and `RunFolder.difference` compares the record with the identity of the requested run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_em import sources
from lightning_em.preflight import num_processes, refuse_control_characters
from lightning_em.redaction import redacted
from lightning_em.runs import RunFolder, sha256_once, start_of

# Settings for where and how a run is computed. They are left out of the identity; every other setting is part of it.
DEVICE_SETTINGS = {
    "trainer": {
        "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "enable_progress_bar", "profiler",
        "enable_model_summary", "log_every_n_steps", "default_root_dir", "plugins", "deterministic", "benchmark",
    },
    "data": {"num_workers", "validation_batch_size"},
    "model": {"sampling", "backend", "store"},
}  # fmt: skip
_SOURCES = ("narrow", "kl", "narrow_validation", "kl_validation", "narrow_extra")
# Options added later, with a default that leaves the result as it was. At the default they are left out of the
# identity, so that earlier runs keep their names.
ADDED_OPTIONS = {
    "model.reference": "live", "data.max_tokens": None, "data.length_buckets": None, "data.narrow_extra": None,
    "data.template_date": "2024-07-26", "data.train_empty_thoughts": False, "data.system_prompt": None,
    **{f"data.{source}.bad_share": 0.5 for source in _SOURCES},
}  # fmt: skip
NOT_PART_OF_A_RUN = {
    "config", "run", "probing", "checkpoint", "ckpt_path", "weights_only", "allow_zero_adapter",
}  # fmt: skip


def run_folder(config: dict[str, Any]) -> RunFolder:
    """Folder of a run: `run.name` if given, else the first config file's name and the hash of the config.

    Raises:
        ValueError: If the path contains a control character such as a line break.
    """
    options = config["run"]
    files = config.get("config") or []
    experiment = Path(files[0]).stem if files else "run"
    name = options["name"] or f"{experiment}-{name_hash(config)}"
    refuse_control_characters("run.root, run.name and the name of a config file", options["root"], name)
    return RunFolder(Path(options["root"]) / name)


def what_a_run_is(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that affects the result.

    Addresses are replaced with their identity at the source, because an address alone does not fix its content.
    """
    kept: dict[str, Any] = {}
    for group, value in config.items():
        if group in NOT_PART_OF_A_RUN:
            continue
        drop = DEVICE_SETTINGS.get(group, set())
        kept[group] = {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
    if isinstance(trainer := kept.get("trainer"), dict):
        kept["trainer"] = trainer | _micro_batches_of_a_step(config["trainer"])
    identified: dict[str, Any] = _identified(_without_added(kept))
    return identified


def _micro_batches_of_a_step(trainer: dict[str, Any]) -> dict[str, int]:
    """Accumulation on one device for the same rows per step: 4 devices x 2 micro-batches are 1 device x 8."""
    processes = num_processes(trainer) or 1
    return (
        {"accumulate_grad_batches": trainer.get("accumulate_grad_batches", 1) * processes}
        if processes > 1
        else {}
    )


def _without_added(value: Any, path: str = "") -> Any:
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, each in value.items():
        inner = f"{path}.{key}" if path else key
        if inner not in ADDED_OPTIONS or each != ADDED_OPTIONS[inner]:
            kept[key] = _without_added(each, inner)
    return kept


def _identified(value: Any) -> Any:
    """Replace `miniature://seed-0/model` with `miniature://<recipe hash>-seed0/model`: a new recipe is a new run."""
    if isinstance(value, dict):
        return {key: _identified(each) for key, each in value.items()}
    return sources.identity(value) if isinstance(value, str) else value


def name_hash(config: dict[str, Any]) -> str:
    """Hash of the config without device settings: eight hexadecimal characters."""
    text = json.dumps(what_a_run_is(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """The identity of the run that a resolved config describes, as recorded in run.json.

    Returns:
        `name`: hash in the name; `config`: hashed fields, without secrets; `data`: SHA-256 of each local data file;
        `start`: result of `start_of`, None for a fresh adapter.
    """
    init_from = config["model"].get("init_from")
    return {
        "name": name_hash(config),
        "config": json.loads(json.dumps(redacted(what_a_run_is(config)), default=str)),
        "data": {str(file): sha256_once(file) for file in _data_files(config)},
        "start": start_of(init_from) if init_from else None,
    }


def _data_files(config: dict[str, Any]) -> list[Path]:
    """The data files of a config that are local; `config` has the identities of the others."""
    paths = [source["path"] for name in _SOURCES if (source := config["data"].get(name))]
    return [Path(path) for path in paths if Path(path).is_file()]
