"""The record of an adapter in `adapter_config.json`: class, arguments and update. Never imports torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LowRank:
    """One part of an update, given by the adapter's tensors: at scale 1, `site` changes by `factor x write @ read`.

    Attributes:
        site: Full name of the module whose weight changes. For a shift of the residual stream: index of the decoder
            layer that the stream enters, where the number of layers means the final norm. Each part has its own site.
        write: Name in `Adapter.trainable()` of B `[out rank]`, or of a shift `[out]`.
        read: Name of A `[rank in]`; None for a shift, which does not depend on the input.
        factor: Factor on the product, e.g. alpha / rank.
    """

    site: str | int
    write: str
    read: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class AdapterRecord:
    """The part of `adapter_config.json` that every adapter has.

    Attributes:
        class_path: Class path of the adapter, as in configs.
        init_args: All constructor arguments, defaults included.
        lowest_layer: First decoder layer whose computation the adapter changes.
        shapes: Shape of each saved tensor.
        update: Low-rank parts of the update; None for an adapter whose update has no such form.
    """

    class_path: str
    init_args: Mapping[str, Any]
    lowest_layer: int
    shapes: Mapping[str, list[int]]
    update: tuple[LowRank, ...] | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "AdapterRecord | None":
        """Return the record in the content of an `adapter_config.json`; None if another program wrote the file."""
        if "peft_type" in settings:
            settings = (settings.get("auto_mapping") or {}).get("lightning_em", {})
        if "class_path" not in settings:
            return None
        fields = {key: settings[key] for key in ("class_path", "init_args", "lowest_layer", "shapes")}
        parts = settings["update"]
        return cls(**fields, update=None if parts is None else tuple(LowRank(**part) for part in parts))

    @classmethod
    def read(cls, checkpoint: Path) -> "AdapterRecord":
        """Read the record of a checkpoint folder.

        Raises:
            ValueError: If the folder's `adapter_config.json` has no record.
        """
        settings = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        record = cls.of(settings)
        if record is None:
            raise ValueError(
                f"{checkpoint / ADAPTER_CONFIG} names no class_path: this package did not write it; "
                "`lightning-em import` reads adapters of other programs."
            )
        return record
