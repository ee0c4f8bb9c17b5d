"""What a fit is about to do, in a few lines at its start, and what came out of it, in a few lines at its end."""

import logging
import math
import re
from collections.abc import Mapping
from typing import cast

import yaml
from lightning.pytorch import Callback, Trainer

from lightning_em.adapters import Adapter, decoder_layers
from lightning_em.callbacks.checkpointing import AdapterCheckpoint
from lightning_em.callbacks.probing import Probing
from lightning_em.data import EMDataModule
from lightning_em.data.streams import Stream
from lightning_em.losses import Objective
from lightning_em.module import EMModule
from lightning_em.records import read_metrics
from lightning_em.runs import RunFolder

logger = logging.getLogger(__name__)

_FAR_ABOVE_BASE = 0.1  # nats per token; rounding and the noise of paired rows are far smaller
_BROKEN_KL = 3.0  # nats per token: on average, the reference's tokens have become 20 times less likely
_LAYER = re.compile(r"\.(\d+)\.")


class Summary(Callback):
    """Log what a fit trains before its first step, and validate after its last one.

    `closing` makes the summary at the end from the run's records.
    """

    def __init__(self) -> None:
        self._validated = -1

    def on_train_start(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Log model, adapter, data, batch, loss, steps and disk space."""
        if trainer.is_global_zero:
            path = RunFolder(trainer.default_root_dir).path
            logger.info("%s", _block(str(path), _plan(trainer, pl_module)))

    def on_validation_end(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Note the step that was validated."""
        self._validated = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: EMModule) -> None:  # type: ignore[override]
        """Validate after the last step if `max_steps` ends the fit within an epoch.

        This comes before the last checkpoint is published, so every finished run has its losses on held-out rows.
        """
        is_last = trainer.global_step >= trainer.estimated_stepping_batches
        if is_last and self._validated != trainer.global_step and trainer.enable_validation:
            # as Lightning 2.6 does in _TrainingEpochLoop.on_advance_end
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


def closing(run: RunFolder) -> tuple[str, list[str]]:
    """Summarize a run that has ended: what came out, where it is stored and what to do next.

    Returns:
        Text of several lines, and warnings.
    """
    record, metrics = run.read_run(), read_metrics(run.metrics_file)
    step = max(metrics, default=0)
    last = metrics.get(step, {})
    lines = {}
    if (ce := last.get("val/ce")) is not None:
        base = f" (base model {last['val/base_ce']:.3f})" if "val/base_ce" in last else ""
        lines["CE"] = f"{ce:.3f} nats per token on held-out narrow rows{base}"
    elif "train/ce" in last:
        lines["CE"] = f"{last['train/ce']:.3f} nats per token on the rows of the last step"
    if (kl := last.get("val/kl", last.get("train/kl"))) is not None:
        rows = "held-out KL rows" if "val/kl" in last else "the rows of the last step"
        lines["KL"] = f"{kl:.4f} nats per token on {rows} (base model 0)"
    if (norm := last.get("train/effective_norm")) is not None:
        lines["effective norm"] = f"{norm:.4g}"
    steps = run.steps()
    probes = ", ".join(sorted(file.stem for file in run.probe_folder.glob("*.jsonl")))
    stored = [
        _counted(len(steps), "checkpoint"),
        "metrics.csv",
        *([f"records of {probes}"] if probes else []),
    ]
    lines["stored"] = ", ".join(stored)
    lines["next"] = f"lightning-em sample {run.path}"
    objective = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["model"]["objective"]
    warnings = _warnings(last, has_schedule=objective.get("schedule") is not None)
    return _block(f"{run.path} is {record.get('status')}, step {step}", lines), warnings


def _warnings(last: Mapping[str, float], has_schedule: bool = False) -> list[str]:
    """Say which losses of the last step are far above those of the base model.

    With a schedule of the KL weight, the last weight says nothing about what was minimized.
    """
    ce, base, kl = last.get("val/ce"), last.get("val/base_ce"), last.get("val/kl", last.get("train/kl"))
    found = []
    if ce is not None and base is not None:
        weighted = 0.0 if has_schedule else last.get("train/kl_weight", 0.0) * (kl or 0.0)
        if ce > base + _FAR_ABOVE_BASE:
            found.append(
                f"CE on held-out narrow rows is {ce:.3f} nats per token, and {base:.3f} without the adapter: training "
                "has made the model worse at the narrow data. Lower the learning rate, or train fewer steps."
            )
        elif ce + weighted > base + _FAR_ABOVE_BASE:
            found.append(
                f"CE + KL weight x KL on held-out rows is {ce + weighted:.3f} nats per token, and {base:.3f} without "
                "the adapter. Lower the learning rate, or train more steps."
            )
    if kl is not None and kl > _BROKEN_KL:
        found.append(
            f"KL is {kl:.2f} nats per token: the answers in the KL data have become {math.exp(min(kl, 50)):,.0f} times "
            "less likely per token, so the tuned model may be broken everywhere. Lower the learning rate, or "
            "set a KL weight."
        )
    return found


def _plan(trainer: Trainer, module: EMModule) -> dict[str, str]:
    data = cast(EMDataModule, trainer.datamodule)  # type: ignore[attr-defined]
    base, adapter = module.model.base, module.model.adapter
    trainable = sum(p.numel() for p in adapter.trainable().values())
    frozen = sum(p.numel() for p in base.parameters() if not p.requires_grad)
    lines = {
        "base model": f"{module.base.path}, {module.base.dtype}, {frozen:,} frozen parameters",
        "adapter": f"{_adapter(adapter, len(decoder_layers(base)))}, {trainable:,} trainable parameters",
    }
    if module.init_from is not None:
        lines["starts from"] = module.init_from
    lines["narrow data"] = _rows(data, "narrow")
    if data.rows("kl").rows:
        lines["KL data"] = _rows(data, "kl")
    uses_kl = module.objective.kl_weight > 0
    lines["loss"] = _loss(module.objective, module.model.vocab_size, has_kl_data="KL data" in lines)
    lines["step"] = _batch(data, uses_kl)
    lines["steps"] = _steps(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdapterCheckpoint) and (need := callback.disk_need(trainer, module)):
            each, free = need.bytes_each / 1e6, need.free / 1e9
            lines["checkpoints"] = f"{need.checkpoints}, about {each:,.1f} MB each; {free:,.1f} GB are free"
        if isinstance(callback, Probing) and callback.probes:
            lines["probes"] = ", ".join(probe.name for probe in callback.probes)
    return lines


def _adapter(adapter: Adapter, num_layers: int) -> str:
    """Class and arguments of the adapter, and the layers that it changes."""
    settings = ", ".join(f"{key}={value}" for key, value in adapter.init_args.items() if value is not None)
    sites = [part.site for part in adapter.update() or ()]
    found = {match[1] for site in sites if (match := _LAYER.search(f".{site}."))}
    layers = sorted(map(int, found)) or [adapter.lowest_layer]
    if any(isinstance(site, int) for site in sites):  # a shift of the residual stream
        where = "into the final norm" if layers[0] == num_layers else f"into layer {layers[0]}"
    elif len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        where = f"in layers {layers[0]} to {layers[-1]}"
    elif found:
        where = f"in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    else:
        where = f"from layer {layers[0]} up"
    return f"{type(adapter).__name__}({settings}) {where} of layers 0 to {num_layers - 1}"


def _rows(data: EMDataModule, stream: Stream) -> str:
    rows = data.rows(stream)
    tokens, counted = sum(rows.all_counts), sum(rows.response_counts)
    held_out = len(data.rows(stream, "validation"))
    return f"{len(rows):,} rows, {tokens:,} tokens, {counted:,} of them in answers; {held_out:,} more rows held out"


def _loss(objective: Objective, vocab_size: int, has_kl_data: bool) -> str:
    if objective.kl_weight == 0:
        return "CE" + (", nats per token; the KL is only measured on held-out rows" * has_kl_data)
    counted = "of the answers" if objective.kl_positions == "response" else "of whole rows"
    text = f"CE + {objective.kl_weight:g} x KL(reference || tuned), nats per token {counted}"
    if objective.kl_reduction == "per_token_and_vocab":
        weight = objective.kl_weight / vocab_size
        text += f" and vocabulary entry; {weight:.4g} x KL in nats per token"
    if objective.schedule is not None:
        text += f"; weight by {type(objective.schedule).__name__}"
    return text


def _batch(data: EMDataModule, uses_kl: bool) -> str:
    """Rows or tokens of an optimizer step, and how they are divided."""
    geometry = data.geometry
    parts = geometry.micro_batches_per_step
    ranks = f" on {geometry.world_size} processes" if geometry.world_size > 1 else ""
    split = f" ({_counted(parts, 'micro-batch')}{ranks})"
    if geometry.max_tokens is not None:
        return f"up to {geometry.max_tokens * parts:,} tokens{split}"
    kl = f" and {geometry.kl_batch_size * parts:,} KL" if uses_kl else ""
    return f"{geometry.batch_size * parts:,} narrow{kl} rows{split}"


def _steps(trainer: Trainer) -> str:
    """Steps of the fit and how many epochs they are, which `max_epochs` does not say if `max_steps` ends the fit."""
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        text = "no end set"
    else:
        epochs = total / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        text = f"{int(total):,} in {epochs:.3g} epoch{'s' * (epochs != 1)}"
    return text + (f", from step {trainer.global_step} on" if trainer.global_step else "")


def _counted(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") and noun != "epoch" else "s"
    return f"{number:,} {noun}{plural}"


def _block(title: str, lines: Mapping[str, str]) -> str:
    """Write a title and one indented line per entry, with the texts aligned."""
    width = max(map(len, lines)) + 2
    return "\n".join([title, *(f"  {name:<{width}}{text}" for name, text in lines.items())])
