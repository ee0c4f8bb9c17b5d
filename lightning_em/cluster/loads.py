"""Memory loads of the probes of a fit, from the lengths of rows, without loading a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_em.cluster.memory import Load
from lightning_em.models.fast import CONCAT_TOKENS

_DIFFERENTIATING = ("GradientNorm",)
_GENERATING = ("ChatKL",)


def probing_loads(probing: Mapping[str, Any], streams: Mapping[str, Sequence[int]], like: Load) -> list[Load]:
    """Return the loads of the largest batches that probes run, in addition to the weights and the optimizer.

    A probe that computes gradients does so for one stream at a time; all other probes run without gradients. A probe
    that samples answers keeps the keys and values of prompts and answers in memory meanwhile.

    Args:
        probing: Settings of the probing callback, as in a resolved config.
        streams: Row lengths in tokens by stream, longest first.
        like: Load of training, for its shards, device and store.
    """
    size, loads = int(probing["batch_size"]), []
    for probe in probing.get("probes") or ():
        name, options = str(probe["class_path"]).rsplit(".", 1)[-1], probe.get("init_args") or {}
        count = int(options.get("batch_size") or size)
        for lengths in streams.values():
            rows = list(lengths[:count])
            if not rows:
                continue
            if name in _DIFFERENTIATING:
                loads.append(Load.of_rows(rows, [], like.shards, like.device, like.store_bytes))
            elif name in _GENERATING:
                # generation, with keys and values at their final size, then the KL on prompts and answers
                whole = sum(rows) + len(rows) * int(options["max_new_tokens"])
                loads.append(replace(like, part_tokens=0, batch_tokens=sum(rows), generated_tokens=whole))
                loads.append(replace(like, part_tokens=0, batch_tokens=whole))
            else:
                loads.append(replace(like, part_tokens=0, batch_tokens=_of_sweep(rows, lengths, like.shards)))
    return loads


def _of_sweep(batch: Sequence[int], rows: Sequence[int], shards: int) -> int:
    """Return the tokens of one forward pass: those of one batch, or of several short batches in one pass."""
    # with a sharded base model, batches are not concatenated
    return max(sum(batch), min(CONCAT_TOKENS, sum(rows))) if shards == 1 else sum(batch)
