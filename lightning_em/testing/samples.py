"""A model and rows small enough to check a contract within seconds."""

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from lightning_em.batch import EncodedRow, PackedBatch


def small_base() -> PreTrainedModel:
    """Return a random two-layer Qwen2 with logits that are far from uniform."""
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    small: PreTrainedModel = model.eval()
    return small


def rows(base: PreTrainedModel, seed: int) -> PackedBatch:
    """Return three random rows of different length; the first three tokens of each are the prompt."""
    vocab_size = base.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate((7, 12, 9)):
        tokens = torch.randint(vocab_size, (length,), generator=generator).tolist()
        rows.append(EncodedRow(tokens, [position > 2 for position in range(length)], f"check-{seed}-{index}"))
    return PackedBatch.from_rows(rows).to(base.device)


def row(batch: PackedBatch, index: int) -> PackedBatch:
    """Return a batch with one row of `batch`."""
    start = sum(batch.lengths[:index])
    span = slice(start, start + batch.lengths[index])
    ids, mask = batch.input_ids[span].tolist(), batch.response_mask[span].tolist()
    return PackedBatch.from_rows([EncodedRow(ids, mask, batch.row_ids[index])]).to(batch.input_ids.device)
