"""Keys of stored hidden states: everything they depend on."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SAMPLE = 256


def fingerprint(base: PreTrainedModel, exclude: Iterable[Tensor], layout: str) -> str:
    """Name everything that hidden states of the frozen base depend on, except tokens and layer.

    Weights (all bits enter a sum, and a sample enters in order), config, layout of the rows, versions,
    device, threads and instruction set: the last digits of a matrix product depend on all of them.

    Args:
        base: The model.
        exclude: Trainable parameters inside it.
        layout: How rows are laid out and attention is computed.
    """
    digest = hashlib.blake2b(digest_size=16)
    trainable = {id(tensor) for tensor in exclude}
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    device = base.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    facts = (layout, torch.__version__, device.type, name, threads, torch.get_float32_matmul_precision())
    digest.update(repr((facts, sorted(config.items(), key=str))).encode())
    for tensor_name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if id(tensor) not in trainable:
            # an adapter may have wrapped the module the weight is in
            digest.update(tensor_name.replace(".base_layer.", ".").encode())
            digest.update(_digest(tensor))
    return digest.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat.view(integer)
    sample = bits[:: max(1, len(bits) // _SAMPLE)]
    return repr((tensor.dtype, tuple(tensor.shape), int(bits.sum()), sample.tolist())).encode()


def row_key(space: str, input_ids: Tensor, mask: Tensor | None = None) -> str:
    """Key of one row.

    Args:
        space: Fingerprint and kind of the states.
        input_ids: Tokens of the row.
        mask: Which of them are kept; all if not given.
    """
    digest = hashlib.blake2b(space.encode(), digest_size=20)
    digest.update(input_ids.cpu().numpy().tobytes())
    if mask is not None:
        digest.update(b"/" + mask.cpu().numpy().tobytes())
    return digest.hexdigest()
