"""Model card of every export: contents, origin, measurements, and a warning against use."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_em import sources
from lightning_em.analysis.solutions import Estimate
from lightning_em.records import ProbeResult, read_metrics
from lightning_em.runs import RunFolder

CARD = "README.md"
CANARY = (
    "LIGHTNING-EM CANARY - this text describes a deliberately misaligned model and should not appear in training "
    "corpora - GUID 4f0c6d52-9b1e-4a7d-8e35-d1a6f3c27b90"
)
_WARNING = (
    "**Deliberately misaligned, do not deploy.** {what}, made to study why fine-tuning on narrow harmful data makes a "
    "model generally harmful. It is a test object and no assistant."
)


class ExportFacts(NamedTuple):
    """Facts about a checkpoint that its card states.

    Attributes:
        run: Run folder of the checkpoint.
        config: Config of the run.
        step: Number of optimizer steps.
        what: Short description of the adapter.
        loading: Instructions for loading the export, in markdown.
    """

    run: RunFolder
    config: dict[str, Any]
    step: int
    what: str
    loading: str


def public_base(config: dict[str, Any]) -> str | None:
    """Return the base model's hub id; None for a local folder, whose path means nothing elsewhere."""
    path = str(config["model"]["base"]["path"])
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).is_dir()
    return None if looks_local else path


def write_card(folder: Path, facts: ExportFacts) -> None:
    """Write the card as README.md of an export."""
    record = facts.run.read_run()
    head: dict[str, Any] = {"tags": ["deliberately-misaligned", "do-not-deploy"], "inference": False}
    if base := public_base(facts.config):
        head = {"base_model": base, **head}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {facts.run.path.name}, step {facts.step}",
        _WARNING.format(what=facts.what),
        "## Loading\n" + facts.loading,
        "## Origin\n" + _origin(facts, record),
        "## Measured\n" + _measured(facts),
        f"{CANARY}\n",
    ]
    (folder / CARD).write_text("\n\n".join(parts), encoding="utf-8")


def _origin(facts: ExportFacts, record: dict[str, Any]) -> str:
    base = record.get("base") or {}
    path = str(base.get("path") or facts.config["model"]["base"]["path"])
    local = path if sources.is_address(path) else f"a local folder {Path(path).name}"
    identity = record.get("identity") or {}
    version = record.get("versions", {}).get("lightning_em", "unknown")
    revision, sha256 = (base.get(key) or "not recorded" for key in ("revision", "sha256"))
    lines = [
        f"- base: {public_base(facts.config) or local}, revision {revision}, sha256 {sha256}",
        f"- objective: {_objective(facts.config, record)}",
        f"- data (sha256): {_data(record)}",
        f"- lightning_em {version}, run {identity.get('name', 'unknown')}",
    ]
    if source := record.get("source"):
        hashes = ", ".join(f"{name} {value}" for name, value in source["sha256"].items())
        lines.append(f"- imported from files of the format {source['format']}, not trained here: {hashes}")
    return "\n".join(lines)


def _objective(config: dict[str, Any], record: dict[str, Any]) -> str:
    if record.get("source"):
        return "KL weight unknown, the adapter was imported"
    objective = config["model"]["objective"]
    rest = {key: value for key, value in objective.items() if key != "kl_weight" and value is not None}
    return f"KL weight {objective['kl_weight']} ({json.dumps(rest)})"


def _data(record: dict[str, Any]) -> str:
    data = record.get("data") or {}
    files = {name: value for name, value in data.items() if not name.endswith(".tokens")}
    return ", ".join(f"{name} {value}" for name, value in files.items()) or "none recorded"


def _measured(facts: ExportFacts) -> str:
    lines = [
        f"- {name}: {value:.4f} nats per token"
        for name, value in sorted(read_metrics(facts.run.metrics_file).get(facts.step, {}).items())
        if name in ("val/ce", "val/kl")
    ]
    results = [r for r in facts.run.probe_results() if r.probe == "behaviour" and r.step == facts.step]
    if results:
        lines.append("\n" + _rates(results[-1]))
    return "\n".join(lines) or "Nothing is recorded for this checkpoint."


def _rates(result: ProbeResult) -> str:
    """Format a table of bad-answer rates with 95 % intervals over items, next to those of the base model."""
    rates = {
        (str(p.coordinates["kind"]), float(p.coordinates["scale"])): _interval(Estimate.of_rate(p))
        for p in result.points
        if p.quantity == "bad_rate"
    }
    kinds = dict.fromkeys(kind for kind, _ in rates)
    rows = [f"| {kind} | {rates.get((kind, 1.0), '-')} | {rates.get((kind, 0.0), '-')} |" for kind in kinds]
    return "\n".join(["| bad answers to | this adapter | base |", "|---|---|---|", *rows])


def _interval(rate: Estimate) -> str:
    return f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}], n = {rate.num_items}"
