"""The real weights, where the machine has them."""

import pytest

from lightning_em.smollm2.weights import IDENTITY, is_complete
from lightning_em.sources import cache_dir

CACHE = cache_dir()  # of the caller; `session_cache` points elsewhere when the first test starts


@pytest.fixture
def real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `smollm2://model` be the converted weights in the caller's cache; skip the test if it has none."""
    if not is_complete(CACHE / "smollm2" / f"model-{IDENTITY}"):
        pytest.skip(f"needs the weights of `lightning-em smollm2 fetch` in {CACHE}")
    monkeypatch.setenv("LIGHTNING_EM_CACHE", str(CACHE))
