"""Models and batches of the benchmarks: random models with chat-like rows, and a real one with its own rows."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lightning_em.adapters import Adapter, LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.data import ChatEncoder, LengthLimit, as_chats, encode_chats, read_rows
from lightning_em.models import BaseModel

TEMPLATE_TOKENS, MAX_TOKENS = 24, 256
# With this seed, 4 + 4 rows come closest to 1,202 real and 1,720 padded tokens, .54 of them counted.
BATCH_SEED = 1631


@dataclass(frozen=True)
class Shape:
    """Size of a random Qwen2, or of a real model.

    Attributes:
        depth: Share of the layers that lies below the adapter.
        path: Address of a real model; random weights if empty.
        rows: Addresses of rows with `question`, `good` and `bad` for CE and KL; random tokens if empty.
        vector_std: Standard deviation of the entries of the vector.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    depth: float = 0.5
    path: str = ""
    rows: tuple[str, str] | tuple[()] = ()
    vector_std: float = 0.05

    @property
    def layer(self) -> int:
        """Layer of the vector or of the one-layer LoRA, and the lowest one of the LoRA on five."""
        return round(self.num_layers * self.depth)

    def base(self, device: torch.device) -> PreTrainedModel:
        """The frozen model with new modules for each caller and shared weights: a 14B model fits a GPU only once."""
        model = _made(self, device)
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared)

    def make(self, device: torch.device) -> PreTrainedModel:
        """A frozen model with its own weights, equal in every call: float32 on a CPU, bfloat16 on a GPU."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if self.path:
            real: Any = BaseModel(self.path).load_model().to(dtype)
            loaded: PreTrainedModel = real.to(device)
            return loaded
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
_DATA = "smollm2://data/style"
SMOLLM2 = Shape(
    "smollm2", 30, 576, 1536, 9, 3, 49152, path="smollm2://model",
    rows=(f"{_DATA}/narrow_train.jsonl", f"{_DATA}/kl_train.jsonl"),
    vector_std=2.0,  # a norm of 48, as trained vectors of this model have
)  # fmt: skip
SHAPES = CPU_SHAPES | CUDA_SHAPES | {SMOLLM2.name: SMOLLM2}

ADAPTERS = ("vector", "lora", "lora_five", "lora_all")
LORA_RANK, LORA_ALPHA = 32, 64.0


def make_adapter(kind: str, shape: Shape) -> Adapter:
    """Make a steering vector or a rank-32 LoRA; see `lora_sites`."""
    if kind == "vector":
        return SteeringVector(shape.layer - 1, alpha=1.0)  # enters layer `shape.layer`
    layers, modules = lora_sites(kind, shape)
    return LoRA(LORA_RANK, LORA_ALPHA, modules, layers=list(layers))


def lora_sites(kind: str, shape: Shape) -> tuple[list[int], list[str]]:
    """Layers and modules of a LoRA.

    Returns:
        For `lora` and `lora_all`, `down_proj` of one layer or of all. For `lora_five`, the modules of the demo's LoRA
        in every second layer from `shape.layer` on, at most five.
    """
    if kind == "lora_five":
        return list(range(shape.layer, shape.num_layers, 2))[:5], ["q_proj", "v_proj", "down_proj"]
    return [shape.layer] if kind == "lora" else list(range(shape.num_layers)), ["down_proj"]


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


def step_batches(num_rows: int, shape: Shape) -> tuple[PackedBatch, PackedBatch]:
    """Cross-entropy rows and KL rows of one step."""
    if shape.rows:
        ce, kl = shape.rows
        return real_rows(num_rows, shape.path, ce, "bad"), real_rows(num_rows, shape.path, kl, "good")
    generator = torch.Generator().manual_seed(BATCH_SEED)
    return chat_like(num_rows, shape.vocab_size, generator), chat_like(num_rows, shape.vocab_size, generator)


def real_rows(num_rows: int, model: str, path: str, answer: Literal["good", "bad"]) -> PackedBatch:
    """Rows of a file, evenly spaced over it, with the template's own system prompt."""
    rows = read_rows(path)
    chosen = [rows[number * len(rows) // num_rows] for number in range(num_rows)]
    encoder = ChatEncoder(BaseModel(model).load_tokenizer())
    encoded = encode_chats(as_chats(chosen, answer), encoder, LengthLimit(MAX_TOKENS), path)
    return PackedBatch.from_rows(list(encoded.rows))


def describe(*batches: PackedBatch) -> str:
    """Describe the batches of a step: number of rows, real, padded and counted tokens."""
    real = sum(sum(batch.lengths) for batch in batches)
    padded = sum(max(batch.lengths) * batch.num_rows for batch in batches)
    counted = sum(int(batch.counted("response").sum()) for batch in batches)
    rows = "+".join(str(batch.num_rows) for batch in batches)
    return f"{rows} rows, {real} real and {padded} padded tokens (x{padded / real:.2f}), {counted / real:.2f} counted"
