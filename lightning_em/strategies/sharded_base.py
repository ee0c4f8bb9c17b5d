"""FSDP2 for a base model that does not fit one GPU: its blocks are sharded, the adapter is replicated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lightning_em.adapters import decoder_layers
from lightning_em.callbacks import remember_base_sha256
from lightning_em.models import AdaptedModel
from lightning_em.module import EMModule


class ShardedBase(ModelParallelStrategy):
    """Each rank holds a shard of every decoder block; one block at a time is gathered.

    Embedding, final norm and head are kept whole on every rank, because the losses read the head's weight in
    chunks. The adapter is replicated and its gradients are averaged once per optimizer step, so checkpoints are the
    same small folders as elsewhere: a single process can resume what eight ranks have trained. Every rank must run
    the same number of forward passes through the base, or the gathers would deadlock; the activation store is off.

    Args:
        process_group_backend: `gloo` or `nccl`; chosen by device by default.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the base after it has been loaded, then continue with Lightning's setup."""
        module = cast(EMModule, self.lightning_module)
        leave_inference_mode(trainer)
        if not _is_sharded(module.model):
            # while each rank still has all weights
            remember_base_sha256(module.model.base, module.model.adapter)
            module.model.use_lockstep(self._most)
            shard_blocks(module.model, self.device_mesh["data_parallel"])
        super().setup(trainer)
        for parameter in module.model.adapter.trainable().values():
            distributed.broadcast(parameter.data, src=0)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Average the gradients over the ranks after the backward pass, before clipping and callbacks see them."""

        def averaged() -> Any:
            result = closure()
            self._average_gradients()
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    def _average_gradients(self) -> None:
        """Average like DDP, in one all-reduce; the module has multiplied its loss by the number of ranks."""
        average_gradients(
            [*cast(EMModule, self.lightning_module).model.adapter.trainable().values()], self.world_size
        )

    def _most(self, count: int) -> int:
        """Return the largest count of all ranks."""
        counts = torch.tensor(count, device=self.root_device)
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return int(counts)

    # ModelParallelStrategy gathers sharded weights and optimizer states. Those of the adapter are whole on every
    # rank, so the methods below restore the behavior of the base class `Strategy`.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def leave_inference_mode(trainer: Trainer) -> None:
    """Use `no_grad` instead of `inference_mode` in `validate`, `test` and `predict`.

    FSDP2 reuses its all-gather buffers between passes, and tensors created in inference mode cannot be written
    to outside of it. Lightning does the same for FSDP1, for gloo and within a fit.
    """
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def average_gradients(parameters: Sequence[nn.Parameter], world_size: int) -> None:
    """Average gradients over the ranks, with zeros for a missing gradient; None stays None if all ranks miss it.

    Args:
        parameters: Parameters, the same on every rank, with or without gradients: all ranks send equally many numbers.
        world_size: Number of ranks.
    """
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = torch.tensor([float(p.grad is not None) for p in parameters]).to(gradients[0])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), present])
    distributed.all_reduce(flat)
    *sums, found = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(gradients)])
    for parameter, total, anywhere in zip(parameters, sums, found.tolist(), strict=True):
        if anywhere:
            parameter.grad = (total / world_size).view_as(parameter).to(parameter.dtype)


def shard_blocks(model: AdaptedModel, mesh: Any) -> None:
    """Shard the decoder blocks of a loaded model over a mesh, without the adapter's parameters.

    Args:
        model: Base model with its adapter attached.
        mesh: One-dimensional device mesh.
    """
    own = set(model.adapter.trainable().values())
    decoder = model.base.get_decoder()
    for block in decoder_layers(model.base):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=own)
    # The decoder becomes the FSDP root, without parameters of its own, so that all blocks share one set of
    # streams. Initialize it now, while all blocks are in place: the first pass may run with some replaced by stubs.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False, ignored_params=set(decoder.parameters()))
    fully_shard.state(decoder)._lazy_init()  # type: ignore[attr-defined]


def _is_sharded(model: AdaptedModel) -> bool:
    return fully_shard.state(model.base.get_decoder()) is not None  # type: ignore[attr-defined]
