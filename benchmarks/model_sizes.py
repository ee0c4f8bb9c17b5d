"""Estimated memory per GPU by size of the base model: `python -m benchmarks.model_sizes`. Loads no weights.

With `--measure`, on a GPU, it also measures training steps of some base models with random weights.
"""

import argparse
import gc

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from lightning_em.adapters import Adapter, LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.callbacks import Probing
from lightning_em.cluster.loads import probing_loads
from lightning_em.cluster.memory import Load, MemoryEstimate, estimate, on_meta
from lightning_em.losses import LossWeights
from lightning_em.models import AdaptedModel
from lightning_em.probes import ChatKL, GradientNorm

ROW_TOKENS, NARROW_ROWS, KL_ROWS = 400, 2, 8
# the probes of configs/probing/real.yaml that need the most memory
PROBING = Probing([GradientNorm(), ChatKL(batch_size=16, max_new_tokens=200)], batch_size=8)
SHARDS = (1, 2, 4, 8)
_GIB = 2**30


def qwen(
    hidden: int, layers: int, heads: tuple[int, int], intermediate: int, tied: bool = False
) -> PreTrainedConfig:
    """Config of a Qwen2.5 model."""
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        intermediate_size=intermediate,
        vocab_size=151936 if tied else 152064,
        tie_word_embeddings=tied,
    )


def configs() -> dict[str, PreTrainedConfig]:
    """Configs of commonly used models, by name."""
    return {
        "Qwen2.5 0.5B": qwen(896, 24, (14, 2), 4864, tied=True),
        "Qwen2.5 7B": qwen(3584, 28, (28, 4), 18944),
        "Qwen2.5 14B": qwen(5120, 48, (40, 8), 13824),
        "Qwen2.5 32B": qwen(5120, 64, (40, 8), 27648),
        "Llama 3.1 70B": LlamaConfig(
            hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
            intermediate_size=28672, vocab_size=128256, tie_word_embeddings=False,
        ),
    }  # fmt: skip


def needed(config: PreTrainedConfig, shards: int) -> MemoryEstimate:
    """Estimate for a rank-32 LoRA at half depth on a bfloat16 base model, with probes.

    The micro-batch is that of the published runs.
    """
    base, adapter = on_meta(config, "bfloat16"), LoRA(32, 64.0, ["down_proj"], [0.5])
    adapter.bind(base, 0)
    training = Load.of_rows([ROW_TOKENS] * NARROW_ROWS, [ROW_TOKENS] * KL_ROWS, shards, "cuda")
    return estimate(base, adapter, training, *probing_loads(PROBING, {"narrow": [ROW_TOKENS] * 64}, training))


def make_adapter(kind: str) -> Adapter:
    """Make a steering vector at half depth, or a rank-32 LoRA at half depth or in all layers."""
    if kind == "vector":
        return SteeringVector(0.5)
    return LoRA(32, 64.0, ["down_proj"], [0.5] if kind == "LoRA" else None)


def estimated(config: PreTrainedConfig, kind: str) -> MemoryEstimate:
    """Estimate for steps without probes on one GPU."""
    base, adapter = on_meta(config, "bfloat16"), make_adapter(kind)
    adapter.bind(base, 0)
    rows = [ROW_TOKENS] * NARROW_ROWS, [ROW_TOKENS] * KL_ROWS
    return estimate(base, adapter, Load.of_rows(*rows, 1, "cuda"))


def taken(config: PreTrainedConfig, kind: str) -> tuple[int, int]:
    """Peak bytes allocated and reserved by torch during two steps with AdamW; needs a GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = AdaptedModel(base, make_adapter(kind)).to("cuda")
    narrow, kl = (random_rows(number, config.vocab_size).to("cuda") for number in (NARROW_ROWS, KL_ROWS))
    optimizer = torch.optim.AdamW(list(model.adapter.trainable().values()))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        model.step_loss(narrow, kl, LossWeights(1e-3, 1e-3)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def random_rows(number: int, vocab_size: int) -> PackedBatch:
    """Rows of random tokens; two thirds of each row are the answer."""
    mask = [position >= ROW_TOKENS // 3 for position in range(ROW_TOKENS)]
    return PackedBatch.from_rows(
        [EncodedRow(torch.randint(vocab_size, (ROW_TOKENS,)).tolist(), mask, f"{n}") for n in range(number)]
    )


def main() -> None:
    """Print the table of estimates, and with `--measure` the table of measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="also run steps, on a GPU")
    measure = parser.parse_args().measure
    if measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU")
    table = Table(
        "base", *(f"{n} GPU{'s' * (n > 1)}" for n in SHARDS), "weights", "activations", title="GiB a GPU"
    )
    for name, config in configs().items():
        found = [needed(config, shards) for shards in SHARDS]
        totals = [f"{each.total / _GIB:.0f}" for each in found]
        table.add_row(name, *totals, f"{found[0].base / _GIB:.1f}", f"{found[0].activations / _GIB:.1f}")
    Console().print(table)
    if not measure:
        return
    table = Table("base", "adapter", "estimated", "tensors", "reserved", title="GiB on one GPU, no probes")
    for name in ("Qwen2.5 0.5B", "Qwen2.5 7B"):
        for kind in ("LoRA", "vector", "LoRA in all layers"):
            config = configs()[name]
            sizes = [estimated(config, kind).total, *taken(config, kind)]
            table.add_row(name, kind, *(f"{size / _GIB:.1f}" for size in sizes))
    Console().print(table)


if __name__ == "__main__":
    main()
