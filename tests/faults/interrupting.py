"""A probe that is interrupted by a signal."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_em.models import AdaptedModel
from lightning_em.probes import Probe, ProbeExamples
from lightning_em.records import Point, Quantity


class Interrupting(Probe):
    """Send SIGUSR1 to this process, once per `folder`."""

    name = "interrupting"
    quantities = (Quantity("interrupting", "signals"),)

    def __init__(self, folder: str) -> None:
        self.sent = Path(folder) / "sent"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        if not self.sent.exists():
            self.sent.touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return [Point("interrupting", 1.0, "signals")]
