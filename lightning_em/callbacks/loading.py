"""Check before an evaluation that the base model is the run's own and that the adapter has an effect.

An adapter that was not loaded, or that runs on another base model, would look as if nothing had been learned.
"""

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
# Paths, authors' versions and compute dtype do not change which model it is.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash"}
_REMEMBERED = "_lightning_em_sha256"


def base_sha256(base: PreTrainedModel, adapter: Adapter | None = None) -> str:
    """Hash a base model: its config, and about 4096 evenly spaced values of each weight.

    Values are hashed as bfloat16, so that a model has the same hash in every precision it is loaded in.

    Args:
        base: Base model.
        adapter: Adapter attached to it, whose parameters are left out.
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
    """Compute and store the hash while the whole model is on this rank; later its weights may be sharded."""
    setattr(base, _REMEMBERED, base_sha256(base, adapter))


def refuse_other_base(run: RunFolder, module: EMModule) -> None:
    """Check that the base model is the one that the run was trained on.

    Raises:
        ValueError: If it is another model or another revision.
    """
    recorded = run.read_run().get("base", {})
    expected = recorded.get("sha256")
    if expected is None:  # no run.json: nothing to compare with
        return
    found = base_sha256(module.model.base, module.model.adapter)
    if found != expected:
        raise ValueError(
            f"{run.path} was trained on {_described(recorded)} with sha256 {expected[:12]}, but model.base is "
            f"{_described(vars(module.base))} with sha256 {found[:12]}: an adapter only works on its own base. "
            "Set model.base.path and model.base.revision to those of the run."
        )


def refuse_idle_adapter(model: AdaptedModel, batches: Sequence[PackedBatch], source: str) -> None:
    """Check that the logits on real rows differ with and without the adapter.

    Args:
        model: Model with the loaded adapter.
        batches: A few rows.
        source: Origin of the adapter, for the message.

    Raises:
        ValueError: If no logit differs.
    """
    with torch.no_grad():
        for batch in batches:
            moved = batch.to(model.base.device)
            if not torch.equal(model.logits(moved, 1.0), model.logits(moved, 0.0)):
                return
    raise ValueError(
        f"the adapter of {source} does not change the logits, so the base model would be measured. "
        "Use a later checkpoint, or add --allow_zero_adapter if this is intended."
    )


def _described(base: Mapping[str, Any]) -> str:
    revision = base.get("revision")
    return f"{base.get('path')}{f' at revision {revision}' if revision else ''}"


class LoadingCheck(Callback):
    """Check base model and adapter before an evaluation.

    Args:
        checkpoint: Checkpoint folder that is evaluated.
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
