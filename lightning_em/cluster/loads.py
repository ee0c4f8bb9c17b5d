"""Memory loads of the probes of a fit, from the lengths of rows, without loading a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_em.callbacks import Probing
from lightning_em.cluster.memory import Load
from lightning_em.models.fast import CONCAT_TOKENS


def probing_loads(probing: Probing, streams: Mapping[str, Sequence[int]], like: Load) -> list[Load]:
    """Return the loads of the largest batches that probes run, in addition to the weights and the optimizer.

    A probe that needs gradients computes them for one stream at a time; all other probes run without gradients. A probe
    that needs generation keeps the keys and values of prompts and answers in memory meanwhile.

    Args:
        probing: Probing callback with its probes.
        streams: Row lengths in tokens by stream, longest first.
        like: Load of training, for its shards, device and store.
    """
    loads = []
    for probe in probing.probes:
        count = probe.batch_size or probing.batch_size
        for lengths in streams.values():
            rows = list(lengths[:count])
            if not rows:
                continue
            if probe.needs_gradients:
                loads.append(Load.of_rows(rows, [], like.shards, like.device, like.store_bytes))
            elif probe.needs_generation:
                # generation, with keys and values at their final size, then the KL on prompts and answers
                whole = sum(rows) + len(rows) * probe.max_new_tokens
                loads.append(replace(like, part_tokens=0, batch_tokens=sum(rows), generated_tokens=whole))
                loads.append(replace(like, part_tokens=0, batch_tokens=whole))
            else:
                loads.append(replace(like, part_tokens=0, batch_tokens=_of_sweep(rows, lengths, like.shards)))
    return loads


def _of_sweep(batch: Sequence[int], rows: Sequence[int], shards: int) -> int:
    """Return the tokens of one forward pass: those of one batch, or of several short batches in one pass."""
    # with a sharded base model, batches are not concatenated
    return max(sum(batch), min(CONCAT_TOKENS, sum(rows))) if shards == 1 else sum(batch)
