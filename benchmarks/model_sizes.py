"""Memory on each GPU by size of the base: `python -m benchmarks.model_sizes`; estimated, no weight is loaded."""

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from lightning_em.adapters import LoRA
from lightning_em.cluster.loads import probing_loads
from lightning_em.cluster.memory import Load, MemoryEstimate, estimate, on_meta

ROW_TOKENS, NARROW_ROWS, KL_ROWS = 400, 2, 8
PROBING = {  # of configs/probing/real.yaml, what takes most
    "batch_size": 8,
    "probes": [
        {"class_path": "lightning_em.probes.GradientNorm"},
        {"class_path": "lightning_em.probes.ChatKL", "init_args": {"batch_size": 16, "max_new_tokens": 200}},
    ],
}
SHARDS = (1, 2, 4, 8)
_GIB = 2**30


def qwen(
    hidden: int, layers: int, heads: tuple[int, int], intermediate: int, tied: bool = False
) -> PreTrainedConfig:
    """A member of the Qwen2.5 family."""
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
    """The sizes of the models that people take, by name."""
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
    """A rank-32 adapter at half depth, bfloat16, the micro-batch of the published runs, the probes of real models."""
    base, adapter = on_meta(config, "bfloat16"), LoRA(32, 64.0, ["down_proj"], [0.5])
    adapter.bind(base, 0)
    adapter.to("meta")
    training = Load.of_rows([ROW_TOKENS] * NARROW_ROWS, [ROW_TOKENS] * KL_ROWS, shards, "cuda")
    return estimate(base, adapter, training, *probing_loads(PROBING, {"narrow": [ROW_TOKENS] * 64}, training))


def main() -> None:
    """Print the table."""
    table = Table(
        "base", *(f"{n} GPU{'s' * (n > 1)}" for n in SHARDS), "weights", "activations", title="GiB a GPU"
    )
    for name, config in configs().items():
        found = [needed(config, shards) for shards in SHARDS]
        totals = [f"{each.total / _GIB:.0f}" for each in found]
        table.add_row(name, *totals, f"{found[0].base / _GIB:.1f}", f"{found[0].activations / _GIB:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
