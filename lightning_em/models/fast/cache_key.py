"""Cache keys of stored hidden states: hashes of everything that can change a bit of them."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.backends import cuda, mkldnn
from transformers import PreTrainedModel

STORE_FORMAT = 3
"""Version of keys, files and computation. Increase it with every change, so that older states are not found."""

_SDPA_KERNELS: tuple[Callable[[], Any], ...] = (
    *(cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled),
)
_BLOCK_BYTES = 2**20
# The three constants of SplitMix64 (the first is 0x9E3779B97F4A7C15) as signed int64, the type that torch computes in.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def numerics(device: torch.device) -> tuple[object, ...]:
    """Return the settings of this process that can change the last bits of a matrix product."""
    kind = device.type
    on_gpu = kind == "cuda"
    return (
        torch.__version__,
        transformers.__version__,
        kind,
        torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        # the number of CPU threads determines how a sum is split, and so how it rounds
        torch.get_num_threads() if kind == "cpu" else 0,
        torch.get_float32_matmul_precision(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.are_deterministic_algorithms_enabled(),
        mkldnn.enabled,
        *(bool(enabled()) for enabled in _SDPA_KERNELS),
    )


def model_key(base: PreTrainedModel, exclude: Iterable[Tensor], layout: str) -> str:
    """Hash everything that hidden states of the base model depend on, except tokens and layer.

    Args:
        base: The model. Its config and every bit of its weights enter the hash.
        exclude: Trainable parameters inside the model; they do not enter the hash.
        layout: Layout of the rows, which determines the attention function.
    """
    digest = hashlib.blake2b(digest_size=16)
    trainable = {id(tensor) for tensor in exclude}
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    facts = (STORE_FORMAT, layout, *numerics(base.device))
    digest.update(repr((facts, sorted(config.items(), key=str))).encode())
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) not in trainable:
            # peft 0.21 moves a wrapped module to `base_layer`; wrapping must not change the key
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(repr((tensor.dtype, tuple(tensor.shape), _block_sums(tensor))).encode())
    return digest.hexdigest()


@torch.no_grad()
def _block_sums(tensor: Tensor) -> list[int]:
    """Compute one 64-bit checksum for each MiB of a tensor, on the tensor's own device.

    Each 8-byte word is mixed with its position by invertible steps (SplitMix64), and the results are summed. A change
    in one word always changes the checksum; changes in several words cancel with probability 2^-64. A cryptographic
    hash would first have to copy all weights to the CPU: 30 GB for a 14B model.
    """
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    positions = torch.arange(min(len(content), _BLOCK_BYTES) // 8 + 1, device=content.device) * _ODD[0]
    sums = []
    for block in torch.split(content, _BLOCK_BYTES):
        words = torch.zeros(-(-len(block) // 8), dtype=torch.int64, device=block.device)
        words.view(torch.uint8)[: len(block)] = block
        words.bitwise_xor_(positions[: len(words)])
        for shift, odd in zip((30, 27), _ODD[1:], strict=True):
            # torch's >> on int64 is arithmetic (keeps the sign bit); the mask turns it into a logical shift
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(odd)
        sums.append(words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1)).sum())
    found: list[int] = torch.stack(sums).tolist()
    return found


def row_key(model: str, kind: str, input_ids: Tensor, mask: Tensor | None = None) -> str:
    """Return the cache key of one row, `<model key>/<hash of the row>`.

    Args:
        model: The model key.
        kind: Kind of hidden states, for example those that enter a layer.
        input_ids: Token ids of the row, on the CPU.
        mask: True on the tokens whose states are kept, on the CPU; all tokens if not given.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=20)
    digest.update(input_ids.numpy().tobytes())
    if mask is not None:
        digest.update(b"/" + mask.numpy().tobytes())
    return f"{model}/{digest.hexdigest()}"
