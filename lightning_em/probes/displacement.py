"""How far a perturbed adapter is from the trained one, in the unit of its effective norm."""

from collections.abc import Callable

from lightning_em.adapters import Adapter
from lightning_em.adapters.low_rank import difference, update_norm


def displacement_from_here(adapter: Adapter) -> Callable[[], float] | None:
    """A function that gives the effective norm of what the update has changed by since now.

    Args:
        adapter: At the point to measure from.

    Returns:
        The function, which leaves the adapter as it is; None for an adapter whose `update` gives no low-rank parts.
    """
    parts = adapter.update()
    if parts is None:
        return None
    here = {name: parameter.detach().clone() for name, parameter in adapter.trainable().items()}
    return lambda: update_norm(parts, difference(parts, adapter.trainable(), here)).item()
