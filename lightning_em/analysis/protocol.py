"""Measurement protocols: what two measurements must share to be comparable. Never imports torch."""

import hashlib
import json
from collections.abc import Mapping

from lightning_em.records import ProbeResult

# Settings of each probe that only choose where a curve is measured; they do not change its values.
_GRIDS: Mapping[str, tuple[str, ...]] = {
    "behaviour": ("scales",),
    "perturbation_curve": ("strengths",),
    "preference_margin": ("scales",),
    "scale_curve": ("scales", "max_extension", "kl_positions"),  # no reading uses the KL of this probe
    "significance": ("norm_ratios",),
}
# Fields of the record with the rows that each probe reads; other probes may read both streams.
_ROWS: Mapping[str, tuple[str, ...]] = {
    "behaviour": (),
    "perturbation_curve": ("examples",),
    "preference_margin": (),
    "scale_curve": ("examples",),
    "significance": (),
}


def protocol_of(result: ProbeResult) -> str:
    """Return an eight-digit hex hash of everything that a record's values depend on besides run and coordinates.

    The hash covers the base model, the settings and the rows that the probe reads. It excludes:
        the grid: a probe with a coarser grid measures the same curve at fewer coordinates, and its values stay
            comparable;
        rows that the probe does not read: arms trained on different rows may answer the same questions.

    A file named in a setting, such as a file of questions, enters by its name, not by its content.
    """
    grid = _GRIDS.get(result.probe, ())
    fields = {
        "base": result.base,
        "settings": {key: value for key, value in result.settings.items() if key not in grid},
        "rows": [getattr(result, key) for key in _ROWS.get(result.probe, ("examples", "kl_examples"))],
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
