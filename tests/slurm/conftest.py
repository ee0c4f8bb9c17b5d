"""One Slurm for all tests here."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.daemons import Slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Its commands find it by SLURM_CONF."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        found = Slurm(Path(folder))
        try:
            found.start()
            yield found
        finally:
            found.stop()
