"""Random states are restored exactly, on any number of devices."""

import random

import numpy as np
import torch

from lightning_em.checkpoints.randomness import random_states, restore_random_states


def drawn() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_every_stream_goes_on_where_it_was() -> None:
    random.gauss(0, 1)  # caches the second value of a pair
    states = random_states()
    expected = drawn()
    assert drawn() != expected
    restore_random_states(states)
    assert drawn() == expected


def test_one_device_goes_on_where_four_have_stopped(monkeypatch) -> None:
    states = random_states() | {"cuda": [torch.tensor([number]) for number in range(4)]}
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: restored.update({device: int(state)})
    )
    restore_random_states(states)
    assert restored == {0: 0}
