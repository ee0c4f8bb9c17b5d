"""An adapter that did not load, or sits on another base, reads as "nothing learned": refuse it instead."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch
from lightning_em.data import EMDataModule
from lightning_em.models import AdaptedModel
from lightning_em.module import EMModule
from lightning_em.runs import RunFolder

_SAMPLED_VALUES = 4096
# Where the files lay, who wrote them and how they are computed does not make another model of them.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash"}
_REMEMBERED = "_lightning_em_sha256"


def base_sha256(base: PreTrainedModel, adapter: Adapter | None = None) -> str:
    """Hash that stands for a base model: its config, and some 4096 evenly spaced values of each weight.

    Values count in bfloat16, so that one model has one hash in every precision it is loaded in.

    Args:
        base: The model.
        adapter: Which sits in it and does not count.
    """
    if (remembered := getattr(base, _REMEMBERED, None)) is not None:
        return str(remembered)
    config = {key: value for key, value in base.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    own = {id(parameter) for parameter in adapter.trainable().values()} if adapter is not None else set()
    weights = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if id(p) not in own}
    for name in sorted(weights):
        flat = weights[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)]
        digest.update(name.encode())
        digest.update(str(tuple(weights[name].shape)).encode())
        digest.update(sample.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def remember_base_sha256(base: PreTrainedModel, adapter: Adapter | None = None) -> None:
    """Compute the hash while the whole model is here; afterwards its weights may be shards of themselves."""
    setattr(base, _REMEMBERED, base_sha256(base, adapter))


def refuse_other_base(run: RunFolder, module: EMModule) -> None:
    """Compare the base with the one the run was trained on.

    Raises:
        ValueError: If it is another model or another revision of it.
    """
    recorded = run.read_run().get("base", {})
    expected = recorded.get("sha256")
    if expected is None:  # a folder without its run.json: nothing to compare with
        return
    found = base_sha256(module.model.base, module.model.adapter)
    if found != expected:
        raise ValueError(
            f"{run.path} was trained on {_described(recorded)} with sha256 {expected[:12]}, but model.base is "
            f"{_described(vars(module.base))} with sha256 {found[:12]}: an adapter means nothing on another base. "
            "Set model.base.path and model.base.revision to the run's own."
        )


def refuse_idle_adapter(model: AdaptedModel, batches: Sequence[PackedBatch], source: str) -> None:
    """Compare the logits with and without the adapter on real rows.

    Args:
        model: With the adapter as it was loaded.
        batches: A few rows.
        source: Where the adapter comes from, for the message.

    Raises:
        ValueError: If no logit differs.
    """
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(model.base.device)
            if not torch.equal(model.logits(moved, 1.0), model.logits(moved, 0.0)):
                return
    raise ValueError(
        f"the adapter of {source} does not change the logits: what is measured would be the base model. "
        "Take a later checkpoint, or add --allow_zero_adapter if that is what you want to see."
    )


def _described(base: Mapping[str, Any]) -> str:
    revision = base.get("revision")
    return f"{base.get('path')}{f' at revision {revision}' if revision else ''}"


class LoadingCheck(Callback):
    """Before an evaluation: is this the run's own base, and does the adapter do anything?

    Args:
        checkpoint: The folder that is evaluated.
        allow_zero_adapter: Whether an adapter without effect may be evaluated.
    """

    def __init__(self, checkpoint: Path, allow_zero_adapter: bool = False) -> None:
        self.checkpoint, self.allow_zero_adapter = checkpoint, allow_zero_adapter

    def _check(self, trainer: Trainer, module: EMModule) -> None:
        refuse_other_base(RunFolder(self.checkpoint.parent.parent), module)
        if not self.allow_zero_adapter:
            data = cast(EMDataModule, trainer.datamodule)  # type: ignore[attr-defined]
            refuse_idle_adapter(module.model, data.probe_batches("narrow", 2, 2), str(self.checkpoint))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check before the first batch."""
        self._check(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check before the first batch."""
        self._check(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check before the first batch."""
        self._check(trainer, pl_module)
