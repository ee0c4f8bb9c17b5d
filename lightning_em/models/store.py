"""A store for hidden states of the frozen base, which are the same in every epoch, seed and sweep."""

import hashlib
import logging
import os
import platform
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_GIB = 2**30
_SAMPLE = 256


class ActivationStore:
    """Tensors by key in up to three tiers: the GPU, RAM, and a folder of memory-mapped files.

    It fills as it is used and stops at its limits; nothing is thrown out, because epochs go round and
    what was dropped would be the next to be asked for. Several processes may share the folder: files are
    complete when they appear, and a damaged one is found by its checksum, removed and written anew.

    Args:
        folder: Where the files are; none are written if not given.
        disk_gib: Limit on all files in the folder, in GiB.
        ram_gib: Limit on this process's tensors in RAM, in GiB.
        device_gib: Limit on this process's tensors on a GPU, in GiB.

    Raises:
        ValueError: If a limit is negative.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        disk_gib: float = 50.0,
        ram_gib: float = 4.0,
        device_gib: float = 0.0,
    ) -> None:
        if min(disk_gib, ram_gib, device_gib) < 0:
            raise ValueError(
                f"limits must be at least 0, got disk_gib={disk_gib}, ram_gib={ram_gib}, "
                f"device_gib={device_gib}; change them in the store's init_args."
            )
        self.folder = None if folder is None else Path(folder).expanduser()
        self.limits = {
            "device": int(device_gib * _GIB),
            "ram": int(ram_gib * _GIB),
            "disk": int(disk_gib * _GIB) if folder else 0,
        }
        self.used = {"device": 0, "ram": 0, "disk": 0}
        self._tensors: dict[str, dict[str, Tensor]] = {"device": {}, "ram": {}}
        self._verified: set[str] = set()
        self._since_scan: int | None = None
        self._full: set[str] = set()

    def get(self, key: str, device: torch.device) -> Tensor | None:
        """The tensor on `device`, or None if it is not there, or not whole."""
        for tensors in self._tensors.values():
            if key in tensors:
                return tensors[key].to(device, non_blocking=True)
        value = self._read(key)
        if value is None:
            return None
        self._keep(key, value, device)
        return value.to(device)

    def put(self, key: str, value: Tensor) -> None:
        """Keep a tensor in each tier that has room."""
        value = value.detach()
        self._keep(key, value, value.device)
        if self.folder is not None and self._has_room("disk", value.nbytes):
            self._write(key, value)

    def announce(self, num_bytes: int, what: str) -> bool:
        """Say how much room something will take before it is filled, and whether it fits.

        Args:
            num_bytes: Bytes it will take.
            what: What it is, for the message.

        Returns:
            True if one tier can hold all of it.
        """
        limit = max(self.limits.values())
        fits = num_bytes <= limit
        logger.info(
            "activation store: %s will take %.2f GiB; the largest tier holds %.2f GiB%s",
            what,
            num_bytes / _GIB,
            limit / _GIB,
            "" if fits else ": the rest is computed each time",
        )
        return fits

    def _keep(self, key: str, value: Tensor, device: torch.device) -> None:
        tier = "device" if device.type != "cpu" and self._has_room("device", value.nbytes) else "ram"
        if key in self._tensors[tier] or not self._has_room(tier, value.nbytes):
            return
        # A copy: a view would keep alive, and a memory map would read again, more than this entry. Outside
        # inference mode: what validation stores, training differentiates through.
        with torch.inference_mode(False):
            self._tensors[tier][key] = value.to(device if tier == "device" else "cpu", copy=True)
        self.used[tier] += value.nbytes

    def _has_room(self, tier: str, num_bytes: int) -> bool:
        if tier == "disk":
            self._count_files(num_bytes)
        if self.used[tier] + num_bytes <= self.limits[tier]:
            return True
        if self.limits[tier] and tier not in self._full:
            self._full.add(tier)
            logger.info("activation store: %s is full at %.2f GiB", tier, self.used[tier] / _GIB)
        return False

    def _count_files(self, num_bytes: int) -> None:
        """Look at the folder now and then: other processes write into it too."""
        if self._since_scan is None or self._since_scan > self.limits["disk"] // 64:
            assert self.folder is not None
            self.used["disk"] = sum(_size(path) for path in self.folder.glob("??/*"))
            self._since_scan = 0
        self._since_scan += num_bytes

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, key: str, value: Tensor) -> None:
        path = self._path(key)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        data = value.cpu().contiguous()
        unfinished = path.with_name(f".{key}.{platform.node()}.{os.getpid()}")
        save_file({"states": data}, unfinished, metadata={"crc32": str(_checksum(data))})
        unfinished.replace(path)
        self.used["disk"] += _size(path)

    def _read(self, key: str) -> Tensor | None:
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:  # maps the file; pages are read when touched
                value: Tensor = file.get_tensor("states")
                whole = key in self._verified or (file.metadata() or {}).get("crc32") == str(_checksum(value))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            logger.warning("activation store: %s is damaged and will be computed again", path)
            path.unlink(missing_ok=True)
            return None
        self._verified.add(key)
        return value


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process renamed or removed it
        return 0


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)


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


def why_not_stored(base: PreTrainedModel) -> str | None:
    """Why a row's hidden states depend on more than the row; None if they do not."""
    found = _rope_types(base.config.to_dict())
    for kind in ("dynamic", "longrope"):
        if kind in found:
            return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    return None


def _rope_types(config: object) -> set[str]:
    """Every `rope_type` in a config, however nested."""
    if not isinstance(config, dict):
        return set()
    own = {str(config[key]) for key in ("rope_type", "type") if isinstance(config.get(key), str)}
    return own.union(*(_rope_types(value) for value in config.values()))
