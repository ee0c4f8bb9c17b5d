"""A callback that writes down what one rank holds of the base."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from lightning_em.adapters import decoder_layers


class TellShards(Callback):
    """Write each rank's share beside the run, in numbers of weights."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.model
        own = {id(p) for p in model.adapter.trainable().values()}
        blocks = [p for p in decoder_layers(model.base).parameters() if id(p) not in own]
        in_blocks = {id(p) for p in blocks}
        others = [p for p in model.parameters() if id(p) not in in_blocks]
        told = {
            "whole": sum(p.numel() for p in blocks),
            "held": sum(p.to_local().numel() for p in blocks if isinstance(p, DTensor)),
            "sharded_elsewhere": sum(isinstance(p, DTensor) for p in others),
            "adapter_is_plain": all(
                type(p).__name__ == "Parameter" for p in model.adapter.trainable().values()
            ),
        }
        file = Path(trainer.default_root_dir) / f"share-{trainer.global_rank}.json"
        file.write_text(json.dumps(told), encoding="utf-8")
