"""Check whether this machine can run an experiment, before a job fails in the queue."""

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from lightning_em import sources
from lightning_em.adapters import LoRA, decoder_layers
from lightning_em.cluster.files import ModelFiles, download
from lightning_em.cluster.loads import probing_loads
from lightning_em.cluster.memory import Load, MemoryEstimate, estimate, memory_there, on_meta
from lightning_em.data import ChatEncoder, EMDataModule
from lightning_em.experiment import Experiment
from lightning_em.models.selection import why_plain
from lightning_em.module import EMModule
from lightning_em.preflight import num_processes, refuse_missing_kl_data, refuse_settings
from lightning_em.rebuild import instantiate_probing
from lightning_em.redaction import redacted_text

_GIB = 2**30
_STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red"}
_SHARDS_TRIED = (2, 4, 8, 16, 32)
_LEAST_FREE = 5 * _GIB


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    topic: str
    level: Literal["ok", "warning", "fault"]
    text: str

    @property
    def is_fault(self) -> bool:
        """Whether a fit would fail."""
        return self.level == "fault"


@dataclass
class Examination:
    """State shared by the checks; a check is skipped if the state it needs is missing."""

    config: dict[str, Any]
    module: EMModule
    data: EMDataModule
    gpu_gib: float | None = None
    files: ModelFiles | None = None
    encoder: ChatEncoder | None = None
    lengths: dict[str, list[int]] = field(default_factory=dict)


Check = Callable[[Examination], Iterator[Finding]]


def check(args: Sequence[str], prefetch: bool = False, gpu_gib: float | None = None) -> list[Finding]:
    """Check everything that an experiment needs, without loading weights.

    The network is used only if `prefetch` is set.

    Args:
        args: Command-line arguments after `fit`.
        prefetch: Whether to first download the model and the tokenizer, or make what an address names.
        gpu_gib: Memory of the target GPUs in GiB. Defaults to that of this machine's GPUs.
    """
    findings = list(_versions())
    try:
        experiment = Experiment(args)
        refuse_settings(experiment.config["trainer"])
        refuse_missing_kl_data(experiment.config)
        examination = Examination(experiment.config, experiment.module, experiment.data, gpu_gib)
        findings.append(Finding("settings", "ok", f"run folder {experiment.folder.path}"))
        if prefetch:
            findings.append(Finding("prefetch", "ok", download(experiment.module.base)))
    except (ValueError, OSError) as error:
        return [*findings, Finding("settings", "fault", str(error))]
    for topic, run in _CHECKS.items():
        try:
            findings += run(examination)
        except (ValueError, OSError) as error:
            findings.append(Finding(topic, "fault", str(error)))
    return findings


def report_table(findings: Sequence[Finding]) -> Table:
    """Build a table of the findings for a terminal, with a summary as its caption."""
    faults = sum(finding.is_fault for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    table = Table("what", "", "finding", title="lightning-em doctor")
    for finding in findings:
        style = _STYLES[finding.level]
        table.add_row(finding.topic, Text(finding.level, style=style), Text(redacted_text(finding.text)))
    counts = {"fault": faults, "warning": warnings}
    table.caption = ", ".join(f"{n} {what}{'s' * (n != 1)}" for what, n in counts.items() if n) or "ready"
    return table


def _versions() -> Iterator[Finding]:
    wrong = []
    try:
        requirements = importlib.metadata.requires("lightning-em") or ()
    except importlib.metadata.PackageNotFoundError:
        text = "lightning-em is not installed, only found by its path: nobody has looked after what it needs"
        yield Finding("versions", "warning", f"{text}; pip install -e . in its folder")
        return
    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue  # a requirement of an extra or of another platform
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed")
            continue
        if found not in wanted.specifier:
            wrong.append(f"{wanted.name} is {found}, needed is {wanted.specifier}")
    if wrong:
        yield Finding("versions", "fault", f"{'; '.join(wrong)}: pip install -U lightning-em")
    else:
        text = f"Python {sys.version.split()[0]}, torch {torch.__version__}, all as needed"
        yield Finding("versions", "ok", text)


def _device(examination: Examination) -> Iterator[Finding]:
    trainer = examination.config["trainer"]
    asked, found = trainer["accelerator"], torch.cuda.device_count()
    if asked == "cpu":
        yield Finding("device", "ok", f"trainer.accelerator is cpu, with {os.cpu_count()} cores")
        return
    if examination.gpu_gib is not None:
        yield Finding(
            "device", "ok", f"for GPUs of {examination.gpu_gib:g} GiB; this machine's are not looked at"
        )
        return
    if not found:
        text = (
            f"no GPU here, and trainer.accelerator is {asked}: give --gpu_gib of the machine it is meant for"
        )
        yield Finding("device", "warning", text)
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(found)})
    devices = str(trainer["devices"])
    if devices.isdecimal() and int(devices) > found:
        text = f"trainer.devices is {devices}, but this machine has {found} GPUs ({', '.join(names)})"
        yield Finding("device", "fault", text)
    else:
        yield Finding("device", "ok", f"{found} GPUs ({', '.join(names)})")
    if examination.module.base.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        yield Finding("device", "fault", "this GPU has no bfloat16: set model.base.dtype=float16")


def _disk(examination: Examination) -> Iterator[Finding]:
    root = Path(examination.config["run"]["root"])
    for topic, folder in (("disk", root), ("cache", sources.cache_dir())):
        # the folder may not exist yet: look at its nearest existing parent
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        text = f"{folder} has {free / _GIB:.1f} GiB free"
        if not os.access(there, os.W_OK):
            yield Finding(
                topic, "fault", f"{there} cannot be written to: set --run.root or LIGHTNING_EM_CACHE"
            )
        else:
            yield Finding(topic, "warning" if free < _LEAST_FREE else "ok", text)


def _model_files(examination: Examination) -> Iterator[Finding]:
    base = examination.module.base
    files = ModelFiles.find(base)
    if files.missing:
        hint = "add --prefetch where there is a network" if files.can_be_fetched else "set model.base.path"
        text = f"{base.path} lacks {', '.join(files.missing)}: {hint}"
        yield Finding("model files", "fault", text)
        examination.files = files if "config.json" not in files.missing and files.folder.is_dir() else None
        return
    examination.files = files
    yield Finding("model files", "ok", f"{base.path}: {files.num_bytes / _GIB:.2f} GiB of weights here")


def _chat_template(examination: Examination) -> Iterator[Finding]:
    if examination.files is None:
        return
    examination.data.base = replace(examination.module.base, path=str(examination.files.folder))
    encoder = examination.encoder = examination.data.encoder
    end_of_turn = _end_of_turn(encoder, examination.files.folder)
    yield Finding("chat template", "ok", "there is one, and it tells which tokens are the answer")
    yield end_of_turn


def _end_of_turn(encoder: ChatEncoder, folder: Path) -> Finding:
    """Compare the token that ends a trained answer with those at which other programs stop sampling."""
    tokenizer, stop_id = encoder.tokenizer, encoder.stop_id
    stops = {"the tokenizer": tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        if (file := folder / name).is_file():
            stops[name] = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            break
    text = f"answers end with {tokenizer.decode([stop_id])!r}"
    others = [
        f"{where} has {tokenizer.decode(ids)!r}"
        for where, named in stops.items()
        if (ids := [named] if isinstance(named, int) else list(named or ())) and stop_id not in ids
    ]
    if others:
        text += (
            f", but {' and '.join(others)} as the end of a text: sampling here stops at each of them; tell other "
            f"programs to stop at token {stop_id} as well"
        )
    return Finding("end of turn", "warning" if others else "ok", text)


def _data(examination: Examination) -> Iterator[Finding]:
    data = examination.data
    if examination.encoder is None:  # without a tokenizer, check only that the files exist
        for source in (source for pair in data.sources.values() for source in pair if source is not None):
            if not sources.is_address(source.path) and not Path(source.path).exists():
                yield Finding(
                    "data", "fault", f"there is no data file {source.path} (looked from {Path.cwd()})"
                )
        return
    data.setup("fit")
    for stream in data.sources:
        rows = data.rows(stream)
        examination.lengths[stream] = sorted(rows.all_counts, reverse=True)
        text = f"{len(rows)} rows, the longest of {examination.lengths[stream][0]} tokens"
        if beyond := [*rows.beyond, *data.rows(stream, "validation").beyond]:
            more = f"positions that the model was not made for in {len(beyond)} rows, first {beyond[0]}"
            yield Finding(f"data {stream}", "warning", f"{text}; {more}: lower data.max_length")
        else:
            yield Finding(f"data {stream}", "ok", text)
    row = data.rows("narrow").rows[0]
    pairs = zip(row.input_ids, row.response_mask, strict=True)
    shown = [
        f"[[{text}]]" if trained else text
        for trained, run in groupby(pairs, key=lambda pair: pair[1])
        if (text := str(examination.encoder.tokenizer.decode([token for token, _ in run])))
    ]
    trained = f"{sum(row.response_mask)} of {len(row.input_ids)} tokens are trained, in [[ ]]"
    yield Finding("mask sample", "ok", f"{row.row_id}: {trained}:\n{''.join(shown)}")


def _memory(examination: Examination) -> Iterator[Finding]:
    if examination.files is None:
        return
    module, trainer = examination.module, examination.config["trainer"]
    base = on_meta(replace(module.base, path=str(examination.files.folder)).load_config(), module.base.dtype)
    # the adapter binds to a base model on the meta device: shapes without memory
    adapter = module._adapter[0]
    adapter.bind(base, module.seed)
    size = sum(parameter.numel() for parameter in adapter.trainable().values())
    text = f"{size:,} parameters from layer {adapter.lowest_layer} of {len(decoder_layers(base))} up"
    text += f": {adapter.reached()}" if isinstance(adapter, LoRA) else ""
    yield Finding("adapter", "ok", text)
    if module.backend == "plain" or why_plain(base) is not None:
        yield Finding(
            "memory", "warning", "the plain backend keeps all logits of a batch; no estimate for it"
        )
        return
    device = "cpu" if trainer["accelerator"] == "cpu" else "cuda"
    num_devices = num_processes(trainer) or max(1, torch.cuda.device_count())
    shards = num_devices if "ShardedBase" in str(trainer["strategy"]) else 1

    def needed(shards: int) -> MemoryEstimate:
        return estimate(base, adapter, *_loads(examination, shards, device))

    has = memory_there(device, examination.gpu_gib)
    wanted = needed(shards)
    text = f"about {wanted}{f'; there are {has / _GIB:.1f} GiB' if has else ''}"
    if has is None:
        yield Finding("memory", "warning", f"{text}; compared with nothing: give --gpu_gib")
        return
    if wanted.total <= has:
        yield Finding("memory", "ok", text)
        return
    yield Finding("memory", "fault", f"{text}: {_advice(examination, wanted, needed, has)}")


def _loads(examination: Examination, shards: int, device: str) -> list[Load]:
    """Return the loads of a micro-batch and of probes on the longest rows.

    If the data could not be read, rows have the maximum length allowed.
    """
    data, store = examination.data, examination.module.store
    counts = {"narrow": data.batch_size, "kl": data.kl_batch_size if "kl" in data.sources else 0}
    probing = instantiate_probing(examination.config["probing"])
    most = max(*counts.values(), probing.num_examples)
    known = {
        stream: examination.lengths.get(stream, [data.limit.max_length] * most if count else [])
        for stream, count in counts.items()
    }
    rows = {stream: known[stream][:count] for stream, count in counts.items()}
    on_device = int((getattr(store, "device_gib", 0) or 0) * _GIB) if device == "cuda" else 0
    training = Load.of_rows(rows["narrow"], rows["kl"], shards, device, on_device, data.max_tokens)
    return [training, *probing_loads(probing, known, training)]


def _advice(
    examination: Examination, wanted: MemoryEstimate, needed: Callable[[int], MemoryEstimate], has: float
) -> str:
    if examination.module.base.dtype in ("float32", "float64"):
        return "set model.base.dtype=bfloat16"
    if fitting := next((shards for shards in _SHARDS_TRIED if needed(shards).total <= has), None):
        return (
            f"share the base over {fitting} GPUs: --trainer configs/trainer/fsdp2.yaml --trainer.devices {fitting} "
            f"{_same_rows(examination.config['trainer'], fitting)}"
        )
    largest = max(vars(wanted), key=lambda name: float(getattr(wanted, name)))
    return f"most of it is {largest}; lower data.batch_size, data.kl_batch_size or data.max_length"


def _same_rows(trainer: dict[str, Any], devices: int) -> str:
    """Return the flag that keeps the rows per optimizer step unchanged on this number of devices."""
    micro_batches = int(trainer["accumulate_grad_batches"]) * (num_processes(trainer) or 1)
    if micro_batches % devices == 0:
        return f"--trainer.accumulate_grad_batches {micro_batches // devices} (the same rows a step)"
    return (
        f"--trainer.accumulate_grad_batches 1 with smaller batches: a step has {micro_batches} micro-batches now, "
        f"which {devices} GPUs cannot share evenly"
    )


_CHECKS: dict[str, Check] = {
    "device": _device,
    "disk": _disk,
    "model files": _model_files,
    "chat template": _chat_template,
    "data": _data,
    "memory": _memory,
}
