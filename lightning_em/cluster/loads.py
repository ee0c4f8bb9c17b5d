"""What a fit asks of the memory, in training and in its probes: rows by their lengths, nothing is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_em.cluster.memory import Load
from lightning_em.models.fast import CONCAT_TOKENS

_DIFFERENTIATING = ("GradientNorm",)
_GENERATING = ("ChatKL",)


def probing_loads(probing: Mapping[str, Any], streams: Mapping[str, Sequence[int]], like: Load) -> list[Load]:
    """The largest batches that probes run, beside the weights and the optimiser.

    A gradient is of the rows of one stream at a time; every other probe runs without one. A probe that draws answers
    keeps keys and values of prompts and answers meanwhile.

    Args:
        probing: Settings of the callback, as in a resolved config.
        streams: Tokens of rows by stream, the longest first.
        like: Training's load, for shards, device and store.
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
                whole = sum(rows) + len(rows) * int(options["max_new_tokens"])
                loads.append(replace(like, part_tokens=0, batch_tokens=sum(rows), generated_tokens=whole))
                loads.append(replace(like, part_tokens=0, batch_tokens=whole))
            else:
                loads.append(replace(like, part_tokens=0, batch_tokens=_of_sweep(rows, lengths, like.shards)))
    return loads


def _of_sweep(batch: Sequence[int], rows: Sequence[int], shards: int) -> int:
    """Tokens of a pass: of one batch, or of as many short ones as share it."""
    return max(sum(batch), min(CONCAT_TOKENS, sum(rows))) if shards == 1 else sum(batch)
