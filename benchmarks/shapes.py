"""Model shapes and chat-like batches of the benchmarks."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lightning_em.adapters import Adapter, LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch

TEMPLATE_TOKENS, MAX_TOKENS = 24, 256
# With this seed, 4 + 4 rows come closest to 1,202 real and 1,720 padded tokens, .54 of them counted.
BATCH_SEED = 1631


@dataclass(frozen=True)
class Shape:
    """Size of a random Qwen2; `layer` is the layer of the vector or the one-layer LoRA."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    depth: float = 0.5

    @property
    def layer(self) -> int:
        """Layer of the adapter; the share `depth` of the layers lies below it."""
        return round(self.num_layers * self.depth)

    def base(self, device: torch.device) -> PreTrainedModel:
        """The frozen model with new modules for each caller and shared weights: a 14B model fits a GPU only once."""
        model = _made(self, device)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared)

    def make(self, device: torch.device) -> PreTrainedModel:
        """A frozen model with its own weights, equal in every call: float32 on a CPU, bfloat16 on a GPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=self.hidden_size**-0.5,
            dtype=dtype,
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(
            dtype
        )  # the constructor uses the default dtype only; float32 would need twice the memory
        try:
            with device:
                model: Any = Qwen2ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        frozen: PreTrainedModel = model.eval().requires_grad_(False)
        return frozen


@cache
def _made(shape: Shape, device: torch.device) -> PreTrainedModel:
    return shape.make(device)


CPU_SHAPES = {
    "shape14b": Shape("shape14b", 24, 256, 704, 4, 2, 4096),
    "headheavy": Shape("headheavy", 12, 256, 704, 4, 2, 16384),
}
CUDA_SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 151936),
    "qwen2.5-7b": Shape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": Shape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 152064),
}
SHAPES = CPU_SHAPES | CUDA_SHAPES

ADAPTERS = ("vector", "lora", "lora_all")
LORA_RANK, LORA_ALPHA, LORA_MODULES = 32, 64.0, ["down_proj"]


def make_adapter(kind: str, shape: Shape) -> Adapter:
    """Make a steering vector, or a rank-32 LoRA of `down_proj` at one layer or at all."""
    if kind == "vector":
        return SteeringVector(shape.layer - 1, alpha=1.0)  # enters layer `shape.layer`
    layers: list[int | float] | None = [shape.layer] if kind == "lora" else None
    return LoRA(LORA_RANK, LORA_ALPHA, LORA_MODULES, layers=layers)


def chat_like(num_rows: int, vocab_size: int, generator: torch.Generator) -> PackedBatch:
    """Rows of random tokens: template, LogNormal(3.4, .6) prompt, LogNormal(4.5, .5) response, cut at 256."""
    rows = []
    for index in range(num_rows):
        prompt, response = (
            int(torch.exp(mean + spread * torch.randn((), generator=generator)))
            for mean, spread in ((3.4, 0.6), (4.5, 0.5))
        )
        prompt += TEMPLATE_TOKENS
        length = min(MAX_TOKENS, prompt + max(1, response))
        tokens = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length + index))
        rows.append(
            EncodedRow(tokens.tolist(), [position >= prompt for position in range(length)], f"{index}")
        )
    return PackedBatch.from_rows(rows)


def step_batches(num_rows: int, vocab_size: int) -> tuple[PackedBatch, PackedBatch]:
    """Cross-entropy rows and KL rows of one step."""
    generator = torch.Generator().manual_seed(BATCH_SEED)
    return chat_like(num_rows, vocab_size, generator), chat_like(num_rows, vocab_size, generator)


def describe(*batches: PackedBatch) -> str:
    """Describe the batches of a step: number of rows, real, padded and counted tokens."""
    real = sum(sum(batch.lengths) for batch in batches)
    padded = sum(max(batch.lengths) * batch.num_rows for batch in batches)
    counted = sum(int(batch.counted("response").sum()) for batch in batches)
    rows = "+".join(str(batch.num_rows) for batch in batches)
    return f"{rows} rows, {real} real and {padded} padded tokens (x{padded / real:.2f}), {counted / real:.2f} counted"
