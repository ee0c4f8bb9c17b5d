"""A store for hidden states of the frozen base, which are the same in every epoch, seed and sweep."""

import logging
import os
import platform
import re
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_GIB = 2**30
_UNFINISHED_FOR_GOOD = 3600.0  # seconds after which whoever was writing a file has died
_UNFINISHED = re.compile(r"\.[0-9a-f]{40}\.")
_SPACE = "?" * 32  # subfolders are named by fingerprints


@dataclass(frozen=True)
class StoreOptions:
    """Where hidden states of the frozen base are kept, and how many.

    They pay from the second use on: over several epochs, and in sweeps over seeds and weights at one layer that
    share a folder. On a CPU they are computed row by row, a little slower than whole batches, so that a run's
    numbers are the same to the bit whatever the store holds; on a GPU only with `trainer.deterministic`.

    Attributes:
        folder: Where runs on the same base and data find each other's states, in a subfolder for each base and
            way to compute; none are written if not given.
        disk_gib: Limit on all files in the folder, in GiB.
        ram_gib: Limit on each process's states in RAM, in GiB.
        device_gib: Limit on each process's states on its GPU, in GiB.
    """

    folder: str | None = None
    disk_gib: float = 50.0
    ram_gib: float = 4.0
    device_gib: float = 0.0

    def __post_init__(self) -> None:
        limits = {"disk_gib": self.disk_gib, "ram_gib": self.ram_gib, "device_gib": self.device_gib}
        if not all(0 <= limit < float("inf") for limit in limits.values()):
            raise ValueError(
                f"limits must be finite and at least 0, got {limits}; change them in model.store."
            )
        if self.folder is not None and not self.folder.strip():
            raise ValueError(
                f"folder must name a folder, got {self.folder!r}; set model.store.folder, or null for none."
            )


class ActivationStore:
    """Tensors by key in up to three tiers: the GPU, RAM, and a folder of memory-mapped files.

    It fills as it is used and stops at its limits; nothing is thrown out, because epochs go round and
    what was dropped would be the next to be asked for. Several processes may share the folder: files are
    complete when they appear, and a damaged one is found by its checksum, removed and written anew. The
    checksum is computed at the first read, and again when the file's time, size or inode has changed since:
    who writes into a file is caught at the next read, though not by the step that has it mapped just then.

    Args:
        options: Where, and how much.
    """

    def __init__(self, options: StoreOptions = StoreOptions()) -> None:
        self.folder = None if options.folder is None else Path(options.folder).expanduser()
        self.limits = {
            "device": int(options.device_gib * _GIB),
            "ram": int(options.ram_gib * _GIB),
            "disk": int(options.disk_gib * _GIB) if self.folder else 0,
        }
        self.used = {"device": 0, "ram": 0, "disk": 0}
        self._tensors: dict[str, dict[str, Tensor]] = {"device": {}, "ram": {}}
        self._verified: dict[str, tuple[int, ...]] = {}
        self._spaces: set[str] = set()
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
        if not self.limits["disk"]:
            return
        try:
            if self._has_room("disk", value.nbytes):
                self._write(key, value)
        except (SafetensorError, OSError) as error:
            logger.warning("activation store: nothing more is written to %s: %s", self.folder, error)
            self.limits["disk"] = 0

    def announce(self, num_bytes: int, what: str) -> None:
        """Say how much room something will take before it is filled, and whether one tier can hold all of it.

        Args:
            num_bytes: Bytes it will take.
            what: What it is, for the message.
        """
        limit = max(self.limits.values())
        logger.info(
            "activation store: %s will take %.2f GiB; the largest tier holds %.2f GiB%s",
            what,
            num_bytes / _GIB,
            limit / _GIB,
            "" if num_bytes <= limit else ": the rest is computed each time",
        )

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
            if tier == "disk":
                self._warn_of_full_folder()
        return False

    def _warn_of_full_folder(self) -> None:
        assert self.folder is not None
        others = sorted(path.name for path in self.folder.glob(_SPACE) if path.name not in self._spaces)
        logger.warning(
            "activation store: nothing more is written to %s, and what is not there is computed each time. Raise "
            "model.store.disk_gib%s.",
            self.folder,
            f", or delete what belongs to other models or settings if no other run needs it: {' '.join(others)}"
            if others
            else "; all of it belongs to this model and these settings",
        )

    def _count_files(self, num_bytes: int) -> None:
        """Look at the folder now and then: other processes write into it too."""
        if self._since_scan is None or self._since_scan > self.limits["disk"] // 64:
            assert self.folder is not None
            files = list(self.folder.glob(f"{_SPACE}/??/*"))
            _remove_abandoned(files)
            self.used["disk"] = sum(_size(path) for path in files)
            self._since_scan = 0
        self._since_scan += num_bytes

    def _path(self, key: str) -> Path:
        """`<fingerprint>/<row>` lies in the subfolder of its fingerprint."""
        assert self.folder is not None
        space, _, row = key.partition("/")
        self._spaces.add(space)
        return self.folder / space / row[:2] / f"{row}.safetensors"

    def _write(self, key: str, value: Tensor) -> None:
        path = self._path(key)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        data = value.cpu().contiguous()
        unfinished = path.with_name(f".{path.stem}.{platform.node()}.{os.getpid()}")
        try:
            save_file({"states": data}, unfinished, metadata={"crc32": str(_checksum(data))})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        self.used["disk"] += _size(path)

    def _read(self, key: str) -> Tensor | None:
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            with safe_open(path, framework="pt") as file:  # maps the file; pages are read when touched
                value: Tensor = file.get_tensor("states")
                seen = self._verified.get(key) == mark
                whole = seen or (file.metadata() or {}).get("crc32") == str(_checksum(value))
        except OSError:  # not there, or not to be had just now: no reason to remove it
            return None
        except SafetensorError:
            whole = False
        if not whole:
            logger.warning("activation store: %s is damaged and will be computed again", path)
            with suppress(OSError):  # a folder that may only be read
                path.unlink(missing_ok=True)
            return None
        self._verified[key] = mark
        return value


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process renamed or removed it
        return 0


def _remove_abandoned(files: Iterable[Path]) -> None:
    """Remove what a killed process has left half written."""
    for path in files:
        with suppress(OSError):
            if _UNFINISHED.match(path.name) and time.time() - path.stat().st_mtime > _UNFINISHED_FOR_GOOD:
                path.unlink()


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
