"""What `adapter_config.json` says of an adapter: its class, its arguments, its update. Never imports torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LowRank:
    """One part of an update, in the adapter's own tensors: at scale 1 `site` changes by `factor x write @ read`.

    Attributes:
        site: Full name of the module whose weight changes; or, for a shift of the residual stream, the index of
            the decoder layer that the stream enters (the number of layers: the final norm). No two parts share one.
        write: Name in `Adapter.trainable()` of B `[out rank]`, or of a shift `[out]`.
        read: Name of A `[rank in]`; None for a shift, which does not depend on the input.
        factor: Number, e.g. alpha / rank.
    """

    site: str | int
    write: str
    read: str | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class AdapterRecord:
    """The part of `adapter_config.json` that every adapter has.

    Attributes:
        class_path: The adapter's class, as a config names it.
        init_args: Every argument of that class, defaults included.
        lowest_layer: The first decoder layer whose computation the adapter changes.
        shapes: Shape of each saved tensor.
        update: Parts of the update; None for an adapter that has no such form.
    """

    class_path: str
    init_args: Mapping[str, Any]
    lowest_layer: int
    shapes: Mapping[str, list[int]]
    update: tuple[LowRank, ...] | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "AdapterRecord | None":
        """Find the record in the content of an `adapter_config.json`; None if another program wrote it."""
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
            ValueError: If the folder holds an adapter without one.
        """
        settings = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        record = cls.of(settings)
        if record is None:
            raise ValueError(
                f"{checkpoint / ADAPTER_CONFIG} names no class_path: this package did not write it; "
                "`lightning-em import` reads adapters of other programs."
            )
        return record
