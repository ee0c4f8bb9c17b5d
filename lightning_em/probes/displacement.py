"""Distance of a perturbed adapter from the trained one, in the unit of its effective norm."""

from collections.abc import Callable

from lightning_em.adapters import Adapter
from lightning_em.adapters.low_rank import difference, update_norm


def displacement_from_here(adapter: Adapter) -> Callable[[], float] | None:
    """Return a function that measures how far the update has moved since this call.

    Args:
        adapter: Adapter in the state to measure from.

    Returns:
        A function that returns the effective norm of (current update - update at this call) and does not change
        the adapter; None for an adapter whose `update` gives no low-rank parts.
    """
    parts = adapter.update()
    if parts is None:
        return None
    # the norm of (B'A' - BA), not the difference of two norms, which is 0 for a rotation of the update
    here = {name: parameter.detach().clone() for name, parameter in adapter.trainable().items()}
    return lambda: update_norm(parts, difference(parts, adapter.trainable(), here)).item()
