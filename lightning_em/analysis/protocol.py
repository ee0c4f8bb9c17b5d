"""What two measurements must have in common to be compared. Never imports torch."""

import hashlib
import json
from collections.abc import Mapping

from lightning_em.records import ProbeResult

_GRIDS: Mapping[str, tuple[str, ...]] = {
    "behaviour": ("scales",),
    "perturbation_curve": ("strengths",),
    "preference_margin": ("scales",),
    "scale_curve": ("scales", "max_extension", "kl_positions"),  # its KL is in no reading
    "significance": ("norm_ratios",),
}
_ROWS: Mapping[str, tuple[str, ...]] = {
    "behaviour": (),
    "perturbation_curve": ("examples",),
    "preference_margin": (),
    "scale_curve": ("examples",),
    "significance": (),
}


def protocol_of(result: ProbeResult) -> str:
    """Eight hex digits of what the values of a record depend on besides the run and the place on a grid.

    These are the world, the settings, and the probe's rows. Left out are
        the grid: light and full sets of probes give one curve at fewer or more places, whose values stay
            comparable;
        the rows that a probe does not look at: arms may be trained on other rows and answer the same questions.

    What a setting only names, such as a file of questions, counts by its name and not by its content.
    """
    grid = _GRIDS.get(result.probe, ())
    fields = {
        "world": result.world,
        "settings": {key: value for key, value in result.settings.items() if key not in grid},
        "rows": [getattr(result, key) for key in _ROWS.get(result.probe, ("examples", "kl_examples"))],
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
