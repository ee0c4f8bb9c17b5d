"""Save and restore the states of a process's random generators."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states as plain values and tensors."""
    version, state, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (plug-ins may use it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(state), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` returned."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            # a run may resume on fewer devices than it was saved on
            torch.cuda.set_rng_state(cuda_state, device)
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(  # noqa: NPY002 (plug-ins may use it)
        (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)
    )
