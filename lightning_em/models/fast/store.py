"""A store for hidden states of the base model, which are the same in every epoch, seed and sweep."""

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
_ABANDONED_SECONDS = 3600.0  # a temporary file older than this was left by a process that died
_UNFINISHED = re.compile(r"\.[0-9a-f]{40}\.")
_MODEL_FOLDER = "?" * 32  # subfolders are named by model keys


@dataclass(frozen=True)
class StoreOptions:
    """Location and size limits of the activation store.

    Stored states save time from their second use on: in later epochs, and in sweeps over seeds and KL weights that
    share a layer and a folder. On a CPU, states are computed row by row, which is slightly slower than in batches. A
    run's numbers are then bit-identical for any content of the store. On a GPU this holds only with
    `trainer.deterministic`.

    Attributes:
        folder: Folder shared by runs on the same base model and data. It has a subfolder for each combination of base
            model and numerical settings. Nothing is written to disk if not given.
        disk_gib: Limit on the total size of all files in the folder, in GiB.
        ram_gib: Limit on the states that each process keeps in RAM, in GiB.
        device_gib: Limit on the states that each process keeps on its GPU, in GiB.
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
    """Maps keys to tensors in up to three tiers: GPU memory, RAM, and a folder of memory-mapped files.

    The store fills with use and stops at its limits. Nothing is evicted: an epoch visits every row once, so an evicted
    row would be needed again before the rows that were kept in its place.

    Several processes may share the folder. Files appear complete, by an atomic rename. A damaged file is detected by
    its checksum, removed and written again. The checksum is verified at the first read, and again if the file's
    modification time, size or inode has changed. Later writes are detected at the next read, not by a reader that
    already mapped the file.

    Args:
        options: Folder and limits.
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
        self._models: set[str] = set()
        self._since_scan: int | None = None
        self._full: set[str] = set()

    def get(self, key: str, device: torch.device) -> Tensor | None:
        """Return the tensor on `device`, or None if it is missing or damaged."""
        for tensors in self._tensors.values():
            if key in tensors:
                return tensors[key].to(device, non_blocking=True)
        value = self._read(key)
        if value is None:
            return None
        self._keep(key, value, device)
        return value.to(device)

    def put(self, key: str, value: Tensor) -> None:
        """Store a tensor in one tier of memory and in the folder, where they have room."""
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
        """Log the expected size of the data, and whether the largest tier can hold all of it.

        Args:
            num_bytes: Expected size in bytes.
            what: Name of the data, for the message.
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
        # each tensor is in at most one tier of memory: on the GPU while it has room, then in RAM
        tier = "device" if device.type != "cpu" and self._has_room("device", value.nbytes) else "ram"
        if key in self._tensors[tier] or not self._has_room(tier, value.nbytes):
            return
        # Copy: a view would keep its whole batch in memory, and a memory-mapped tensor would read the file again.
        # Outside inference mode: training uses states that validation stored, and autograd refuses inference tensors.
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
        # subfolders that this process has not used belong to other models or numerical settings
        others = sorted(
            path.name for path in self.folder.glob(_MODEL_FOLDER) if path.name not in self._models
        )
        logger.warning(
            "activation store: nothing more is written to %s, and what is not there is computed each time. Raise "
            "model.store.disk_gib%s.",
            self.folder,
            f", or delete what belongs to other models or settings if no other run needs it: {' '.join(others)}"
            if others
            else "; all of it belongs to this model and these settings",
        )

    def _count_files(self, num_bytes: int) -> None:
        """Measure the folder again after each 1/64 of the limit, because other processes write to it too."""
        if self._since_scan is None or self._since_scan > self.limits["disk"] // 64:
            assert self.folder is not None
            files = list(self.folder.glob(f"{_MODEL_FOLDER}/??/*"))
            _remove_abandoned(files)
            self.used["disk"] = sum(_size(path) for path in files)
            self._since_scan = 0
        self._since_scan += num_bytes

    def _path(self, key: str) -> Path:
        """Return the file of the key `<model>/<row>`.

        Rows are spread over subfolders, because a folder with a million files is slow to list.
        """
        assert self.folder is not None
        model, _, row = key.partition("/")
        self._models.add(model)
        return self.folder / model / row[:2] / f"{row}.safetensors"

    def _write(self, key: str, value: Tensor) -> None:
        path = self._path(key)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        data = value.cpu().contiguous()
        # Write a hidden file in the same folder and rename it when complete. A rename is atomic within a file system,
        # so a reader sees either no file or the complete file. The name contains host and process id, because two ranks
        # may write the same row.
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
            # stat before reading: a write between the two is then detected at the next read
            status = path.stat()
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            with safe_open(path, framework="pt") as file:  # maps the file; pages are read when touched
                value: Tensor = file.get_tensor("states")
                # computing the checksum reads the whole file, so an unchanged file is verified only once
                seen = self._verified.get(key) == mark
                whole = seen or (file.metadata() or {}).get("crc32") == str(_checksum(value))
        except OSError:
            # missing or temporarily unreadable, for example with too many open files; keep the file
            return None
        except SafetensorError:
            whole = False
        if not whole:
            logger.warning("activation store: %s is damaged and will be computed again", path)
            with suppress(OSError):  # the folder may be read-only
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
    """Remove temporary files of killed processes."""
    for path in files:
        with suppress(OSError):
            if _UNFINISHED.match(path.name) and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
