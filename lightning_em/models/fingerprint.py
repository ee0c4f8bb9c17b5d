"""Keys of stored hidden states: everything they depend on."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.backends import cuda, mkldnn
from transformers import PreTrainedModel

STORE_FORMAT = 3
"""Goes up with every change of keys, files, or how states are computed: older states are not found then."""

_SDPA_KERNELS: tuple[Callable[[], Any], ...] = (
    *(cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled),
)
_BLOCK_BYTES = 2**20
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # SplitMix64's, as int64


def numerics(device: torch.device) -> tuple[object, ...]:
    """What this process computes with just now, as far as the last digits of a matrix product depend on it."""
    kind = device.type
    on_gpu = kind == "cuda"
    return (
        torch.__version__,
        transformers.__version__,
        kind,
        torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads() if kind == "cpu" else 0,
        torch.get_float32_matmul_precision(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.are_deterministic_algorithms_enabled(),
        mkldnn.enabled,
        *(bool(enabled()) for enabled in _SDPA_KERNELS),
    )


def fingerprint(base: PreTrainedModel, exclude: Iterable[Tensor], layout: str) -> str:
    """Name everything that hidden states of the frozen base depend on, except tokens and layer.

    Args:
        base: The model: every bit of its weights, at its place, and its config.
        exclude: Trainable parameters inside it.
        layout: How rows are laid out and attention is computed.
    """
    digest = hashlib.blake2b(digest_size=16)
    trainable = {id(tensor) for tensor in exclude}
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    facts = (STORE_FORMAT, layout, *numerics(base.device))
    digest.update(repr((facts, sorted(config.items(), key=str))).encode())
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) not in trainable:
            # an adapter may have wrapped the module the weight is in
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(repr((tensor.dtype, tuple(tensor.shape), _block_sums(tensor))).encode())
    return digest.hexdigest()


@torch.no_grad()
def _block_sums(tensor: Tensor) -> list[int]:
    """One 64-bit number for each MiB of a tensor, computed where the tensor lies.

    Each eight bytes are mixed with their place by steps that can be undone (SplitMix64), and added up: to
    change one of them always changes the number, to change several hides with odds of 1 in 2^64.
    """
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    places = torch.arange(min(len(content), _BLOCK_BYTES) // 8 + 1, device=content.device) * _ODD[0]
    sums = []
    for block in torch.split(content, _BLOCK_BYTES):
        words = torch.zeros(-(-len(block) // 8), dtype=torch.int64, device=block.device)
        words.view(torch.uint8)[: len(block)] = block
        words.bitwise_xor_(places[: len(words)])
        for shift, odd in zip((30, 27), _ODD[1:], strict=True):
            words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(odd)
        sums.append(words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1)).sum())
    found: list[int] = torch.stack(sums).tolist()
    return found


def row_key(space: str, kind: str, input_ids: Tensor, mask: Tensor | None = None) -> str:
    """Key of one row: a name inside its fingerprint's folder.

    Args:
        space: The fingerprint.
        kind: Which states.
        input_ids: Tokens of the row, on the CPU.
        mask: Which of them are kept, on the CPU; all if not given.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=20)
    digest.update(input_ids.numpy().tobytes())
    if mask is not None:
        digest.update(b"/" + mask.numpy().tobytes())
    return f"{space}/{digest.hexdigest()}"
