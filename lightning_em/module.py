"""The LightningModule: a frozen base model with an adapter, trained on CE + KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torchmetrics
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lightning_em import runs
from lightning_em.adapters import Adapter
from lightning_em.batch import PackedBatch, TrainBatch
from lightning_em.checkpoints.folder import ADAPTER_CONFIG_KEY
from lightning_em.checkpoints.randomness import random_states, restore_random_states
from lightning_em.data import ChatEncoder, EMDataModule, forget_finished_epoch
from lightning_em.losses import Objective
from lightning_em.models import (
    ActivationStore,
    AdaptedModel,
    BaseModel,
    Sampling,
    StoreOptions,
    sample_answers,
)


class LinearWithWarmup(LambdaLR):
    """Learning-rate schedule with linear warmup and linear decay until the end of training.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        warmup_steps: Number of optimizer steps until the full learning rate.
        final_fraction: Fraction of the full learning rate at the end of the decay.
        num_steps: Number of optimizer steps of the training; taken from the trainer if not given.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 5,
        final_fraction: float = 0.0,
        num_steps: int | None = None,
    ) -> None:
        self.line = _Line(warmup_steps, final_fraction, num_steps)
        super().__init__(optimizer, self.line)

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the schedule function, which is rebuilt from the config."""
        return {key: value for key, value in super().state_dict().items() if key != "line"}


@dataclass
class _Line:
    """Computes the fraction of the full learning rate at a step.

    This is an object and not a function, because `LambdaLR.state_dict` saves callable objects but not functions.
    """

    warmup_steps: int
    final_fraction: float
    num_steps: int | None

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.num_steps is None:
            return 1.0
        left = (self.num_steps - step) / max(1, self.num_steps - self.warmup_steps)
        return max(0.0, self.final_fraction + (1 - self.final_fraction) * left)


class TokenMean(torchmetrics.Metric):
    """Mean over tokens of all batches and ranks: sums and counts are reduced, then divided once."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Add loss sums in nats and their token counts."""
        self.total += sums.sum()
        self.count += counts.sum()

    def compute(self) -> Tensor:
        """Return the mean in nats per token; NaN if no token was counted."""
        return self.total / self.count


class EMModule(LightningModule):
    """Train an adapter on L = CE(narrow data) + weight x KL(reference || tuned)(KL data).

    Args:
        base: The pretrained base model.
        adapter: The adapter to train: any `lightning_em.adapters.Adapter`, also one from your own package.
        objective: The training objective.
        optimizer: Function that creates the optimizer from the adapter's parameters.
        lr_scheduler: Function that creates the schedule from the optimizer; stepped after each optimizer step.
        init_from: Checkpoint of another run, such as `runs/x@step-40`, whose adapter is the starting point; the
            optimizer starts fresh.
        backend: `auto` selects the fast backend where it is verified for the model; `plain` runs full forward passes
            with full logits.
        store: Settings of the store for hidden states below the adapter. It saves time over several epochs and in
            sweeps.
        reference: `live` runs the reference at each use. `cached` keeps its final hidden states in the store; the KL
            of an adapter without effect then consists of rounding errors instead of being exactly 0.
        sampling: Sampling settings of `predict`; they do not affect the identity of the run.
        seed: Seed of the adapter's random initial values.
    """

    model: AdaptedModel

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        objective: Objective = Objective(),  # noqa: B008 (plain CE; jsonargparse shows its fields)
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = LinearWithWarmup,
        init_from: str | None = None,
        backend: Literal["auto", "plain"] = "auto",
        store: StoreOptions | None = None,
        reference: Literal["live", "cached"] = "live",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False
        self.base, self.objective, self.init_from, self.seed = base, objective, init_from, seed
        self.backend: Literal["auto", "plain"] = backend
        self.store, self.reference = store, reference
        self.sampling = sampling
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._adapter = (adapter,)  # a tuple hides it from nn.Module; it is registered once, inside `model`
        self._step_sums = torch.zeros(2, dtype=torch.float64)
        self._rng_to_restore: dict[str, Any] | None = None

    def configure_model(self, loaded: PreTrainedModel | None = None) -> None:
        """Load the base model and attach the adapter; later calls do nothing.

        Args:
            loaded: The base model if it is loaded already, without an adapter.
        """
        if hasattr(self, "model"):
            return
        store = None if self.store is None else ActivationStore(self.store)
        reference: Literal["live", "cached"] = self.reference
        base = self.base.load_model() if loaded is None else loaded
        self.model = AdaptedModel(base, self._adapter[0], self.seed, self.backend, store, reference)
        if self.init_from is not None:
            _, checkpoint = runs.locate(self.init_from)
            self.model.adapter.load(checkpoint)
        self.validation_ce, self.validation_kl = TokenMean(), TokenMean()
        self.validation_base_ce = TokenMean()

    def configure_optimizers(self) -> Any:
        """Create the optimizer of the adapter's parameters, and its schedule over optimizer steps."""
        optimizer = self._optimizer(list(self.model.adapter.trainable().values()))
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, LinearWithWarmup) and scheduler.line.num_steps is None:
            scheduler.line.num_steps = _finite(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Compute the contribution of one micro-batch to the loss of the optimizer step."""
        weight = self.objective.weight_at(self.global_step, self.model.vocab_size)
        if weight > 0 and batch.kl is None:
            raise ValueError(
                f"the KL has the weight {weight:g} at step {self.global_step}, but the batch has no KL rows; give the "
                "data module KL data, or set model.objective.kl_weight to 0."
            )
        kl_rows = batch.kl if weight > 0 else None
        weights = self.objective.weights(batch.step_counts, weight)
        loss = self.model.step_loss(batch.ce, kl_rows, weights, self.objective.kl_positions)
        terms = self.objective.terms(loss.ce, loss.kl, batch.step_counts)
        kl_share = terms.ce.new_full((), math.nan) if terms.kl is None else terms.kl
        self._step_sums = self._step_sums.to(self.device) + torch.stack([terms.ce, kl_share]).double()
        # The contributions are already divided by the counts of the whole optimizer step. Lightning also divides by the
        # number of micro-batches, and DDP by the number of ranks; undo both.
        return loss.total * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the losses of the whole optimizer step, over all micro-batches and ranks."""
        step_sums = self.trainer.strategy.reduce(self._step_sums, reduce_op="sum")
        self._step_sums = torch.zeros_like(self._step_sums)
        ce, kl = step_sums.tolist()
        weight = self.objective.weight_at(self.global_step, self.model.vocab_size)
        metrics = {"train/ce": ce, "train/kl_weight": weight, "train/lr": optimizer.param_groups[0]["lr"]}
        if weight > 0:
            metrics["train/kl"] = kl
            self.objective.observe(kl)
        gradients = [p.grad for p in self.model.adapter.trainable().values() if p.grad is not None]
        metrics["train/gradient_norm"] = torch.stack([g.double().norm() for g in gradients]).norm().item()
        shown = {"ce": ce, "kl": kl}
        if (norm := self.model.adapter.effective_norm()) is not None:
            metrics["train/effective_norm"] = shown["norm"] = norm.item()
        # NaN marks a KL that was not computed; the progress bar shows it as a dash. Without it, Lightning would keep
        # showing the last value that was computed.
        self.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self.write_metrics(metrics, self.global_step + 1)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send metrics to every logger; `step` is the number of optimizer steps taken, 1 after the first."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the CE on held-out narrow data, or the KL on held-out KL data.

        After the last step of a fit, the CE of the base model is measured as well, to compare with.
        """
        if self._validation_streams()[dataloader_idx] != "narrow":
            self.validation_kl.update(*self.model.row_kl(batch, kl_positions=self.objective.kl_positions))
            return
        measured = [(self.validation_ce, 1.0)]
        is_fit = self.trainer.state.fn == TrainerFn.FITTING
        if is_fit and self.global_step >= self.trainer.estimated_stepping_batches:
            measured.append((self.validation_base_ce, 0.0))
        states = [partial(self.model.adapter.at_scale, scale) for _, scale in measured]
        for (metric, _), losses in zip(measured, self.model.sweep_row_ce([batch], states), strict=True):
            metric.update(*losses)

    def _validation_streams(self) -> Sequence[str]:
        """Return the stream of each dataloader; narrow data without held-out questions has no dataloader."""
        data = getattr(self.trainer, "datamodule", None)
        return data.validation_streams if isinstance(data, EMDataModule) else ("narrow", "kl")

    def on_validation_epoch_end(self) -> None:
        """Reduce the metrics over ranks, divide once, and log them."""
        self._finish_evaluation("val")

    def test_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the same metrics as validation, on the test rows."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Reduce the metrics over ranks, divide once, and log them."""
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        metrics = {}
        measured = {"ce": self.validation_ce, "kl": self.validation_kl, "base_ce": self.validation_base_ce}
        for name, metric in measured.items():
            if metric.update_called:
                metrics[f"{stage}/{name}"] = metric.compute().item()
            metric.reset()
        self.log_dict(metrics, logger=False)  # for callbacks; `write_metrics` sends them to the loggers
        if not self.trainer.sanity_checking:
            self.write_metrics(metrics, self.global_step)

    @cached_property
    def _encoder(self) -> ChatEncoder:
        """The encoder of the prompts, which knows the token that ends a trained answer."""
        data = getattr(self.trainer, "datamodule", None)
        return data.encoder if isinstance(data, EMDataModule) else ChatEncoder(self.base.load_tokenizer())

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Sample answers to a batch of prompts; return one dict with `row_id` and `answers` for each prompt."""
        if batch.is_dummy:
            return []
        encoder = self._encoder
        sampled = sample_answers(
            self.model, encoder.tokenizer, batch, self.sampling, stop_ids=[encoder.stop_id]
        )
        return [
            {"row_id": row, "answers": [answer.text for answer in answers]}
            for row, answers in zip(batch.row_ids, sampled, strict=True)
        ]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return only the adapter's tensors; checkpoints do not contain the frozen base model."""
        return {name: p.detach() for name, p in self.model.adapter.trainable().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Restore the adapter's tensors; names and shapes must match even if `strict` is False."""
        self.model.adapter.load_tensors(dict(state_dict), source="the checkpoint")
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the adapter config, the schedule and the random states, which Lightning does not save."""
        checkpoint[ADAPTER_CONFIG_KEY] = self.model.adapter.config_dict()
        checkpoint["kl_schedule"] = self.objective.state_dict()
        checkpoint["rng"] = random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the schedule, and convert the progress counts if the number of ranks has changed.

        The random states are restored before the next training batch.
        """
        self.objective.load_state_dict(checkpoint["kl_schedule"])
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, EMDataModule) and self.trainer.training:
            regear = data.regearing(checkpoint.get("EMDataModule", {}))
            if regear is not None:
                regear.progress(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"])
        self._rng_to_restore = checkpoint["rng"]

    def on_fit_start(self) -> None:
        """Log the largest size of the activation store, before it is filled."""
        data = getattr(self.trainer, "datamodule", None)
        if self.store is not None and isinstance(data, EMDataModule):
            counted = data.num_tokens("kl", self.objective.kl_positions)
            self.model.announce_store(data.num_tokens("narrow") + data.num_tokens("kl"), counted)

    def on_train_start(self) -> None:
        """Make resuming at an epoch boundary work like resuming within an epoch."""
        forget_finished_epoch(self.trainer)

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> None:
        """Restore the random states of the checkpoint before the first batch after resuming."""
        if self._rng_to_restore is not None:
            restore_random_states(self._rng_to_restore)
            self._rng_to_restore = None


def _finite(steps: float) -> int:
    if math.isinf(steps):
        raise ValueError(
            "the learning-rate schedule needs an end: set trainer.max_epochs or trainer.max_steps, or "
            "num_steps of model.lr_scheduler."
        )
    return int(steps)
