"""Keys of stored hidden states: everything that they depend on, down to the last bit."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.backends import cuda, mkldnn
from transformers import PreTrainedModel

STORE_FORMAT = 3
"""Increased with every change of keys, files, or the way states are computed: older states are then not found."""

_SDPA_KERNELS: tuple[Callable[[], Any], ...] = (
    *(cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled),
)
_BLOCK_BYTES = 2**20
# The three constants of SplitMix64, 0x9E3779B97F4A7C15 and so on, as the int64 that torch has.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def numerics(device: torch.device) -> tuple[object, ...]:
    """Settings of this process that can change the last bits of a matrix product."""
    kind = device.type
    on_gpu = kind == "cuda"
    return (
        torch.__version__,
        transformers.__version__,
        kind,
        torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        # the number of threads decides how a sum is divided
        torch.get_num_threads() if kind == "cpu" else 0,
        torch.get_float32_matmul_precision(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.are_deterministic_algorithms_enabled(),
        mkldnn.enabled,
        *(bool(enabled()) for enabled in _SDPA_KERNELS),
    )


def model_key(base: PreTrainedModel, exclude: Iterable[Tensor], layout: str) -> str:
    """Hash of everything that hidden states of the base depend on, except tokens and layer.

    Args:
        base: The model; every bit of its weights counts, at its position, and its config.
        exclude: Trainable parameters inside it.
        layout: Layout of the rows, and with it the attention function.
    """
    digest = hashlib.blake2b(digest_size=16)
    trainable = {id(tensor) for tensor in exclude}
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    facts = (STORE_FORMAT, layout, *numerics(base.device))
    digest.update(repr((facts, sorted(config.items(), key=str))).encode())
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) not in trainable:
            # peft 0.21 puts the module it wraps under `base_layer`; the weight is the same without it
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(repr((tensor.dtype, tuple(tensor.shape), _block_sums(tensor))).encode())
    return digest.hexdigest()


@torch.no_grad()
def _block_sums(tensor: Tensor) -> list[int]:
    """One 64-bit number for each MiB of a tensor, computed on the tensor's own device.

    Every eight bytes are mixed with their position by invertible steps (SplitMix64) and then added up. A change in one
    word always changes the number; changes in several cancel with probability 2^-64. A cryptographic hash would first
    copy all weights to the CPU: 30 GB of a 14B model.
    """
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    positions = torch.arange(min(len(content), _BLOCK_BYTES) // 8 + 1, device=content.device) * _ODD[0]
    sums = []
    for block in torch.split(content, _BLOCK_BYTES):
        words = torch.zeros(-(-len(block) // 8), dtype=torch.int64, device=block.device)
        words.view(torch.uint8)[: len(block)] = block
        words.bitwise_xor_(positions[: len(words)])
        for shift, odd in zip((30, 27), _ODD[1:], strict=True):
            # torch shifts int64 with the sign; the mask makes a logical shift of it
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(odd)
        sums.append(words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1)).sum())
    found: list[int] = torch.stack(sums).tolist()
    return found


def row_key(model: str, kind: str, input_ids: Tensor, mask: Tensor | None = None) -> str:
    """Key of one row: a name inside the folder of its model key.

    Args:
        model: The model key.
        kind: Which states, for example those that enter a layer.
        input_ids: Tokens of the row, on the CPU.
        mask: Tokens whose states are kept, on the CPU; all if not given.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=20)
    digest.update(input_ids.numpy().tobytes())
    if mask is not None:
        digest.update(b"/" + mask.numpy().tobytes())
    return f"{model}/{digest.hexdigest()}"
