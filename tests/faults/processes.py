"""Real processes without import time: a server imports everything once and forks for each command."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lightning_em.manifest import manifest_problems
from lightning_em.runs import RunFolder

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lightning_em.cli", "lightning_em.subcommands", "tests.faults.inject"])


class Ended(NamedTuple):
    """Exit code (negative for a signal) and output of a process."""

    code: int
    output: str


class Running:
    """One `lightning-em` command in its own process."""

    def __init__(self, *words: str, output: Path, **environment: str) -> None:
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self._process = _context.Process(target=_command, args=(words, str(output), environment))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Ended:
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output.read_text()}")
        return Ended(self._process.exitcode, self.output.read_text(encoding="utf-8", errors="replace"))


def _command(words: tuple[str, ...], output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may differ in this process
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from lightning_em.__main__ import main

    sys.exit(main(words))


def run(*words: str, output: Path, **environment: str) -> Ended:
    """Run a command to its end."""
    return Running(*words, output=output, **environment).wait()


def wait_until(condition: Callable[[], object], seconds: float = 180, what: str = "it") -> None:
    """Poll until a condition holds; raise an assertion error after the timeout."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def wait_for_checkpoint(run_folder: RunFolder, process: Running, at_least: int = 1) -> None:
    """Wait until this many checkpoints are published; the process must still be alive."""
    wait_until(
        lambda: len(run_folder.steps()) >= at_least or not process.is_alive, what=f"{at_least} checkpoints"
    )
    assert len(run_folder.steps()) >= at_least, process.output.read_text(errors="replace")


def assert_published_are_valid(run_folder: RunFolder) -> None:
    """Assert that all published checkpoints match their manifests."""
    for step in run_folder.steps():
        assert manifest_problems(run_folder.checkpoint(step)) == []
