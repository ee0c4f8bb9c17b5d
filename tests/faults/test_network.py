"""F32: without a network."""

import os
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import Whole
from tests.fitting import cut_after

WITHOUT_NETWORK = ["unshare", "--net", sys.executable, "-m", "lightning_em"]


def offline(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run without any network interface, and without setting the hub library's offline mode."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB")}
    start = time.monotonic()
    done = subprocess.run(
        [*WITHOUT_NETWORK, *words], capture_output=True, text=True, check=False, env=environment, timeout=200
    )
    return done, time.monotonic() - start


@pytest.fixture(autouse=True)
def may_unshare() -> None:
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("cutting the network needs root")


@pytest.mark.faults
@pytest.mark.fault(
    "F32", "network cut: all subcommands finish; a missing model is an error within 10 s of the imports"
)
def test_subcommands_finish(whole: Whole) -> None:
    cut = cut_after(whole.run, 12, whole.root / "offline")
    flags = ["--config", str(cut.config_file), "--ckpt_path", str(cut.path)]
    probing = whole.root / "offline-probing.yaml"
    probing.write_text(
        "probes: [{class_path: lightning_em.probes.ScaleCurve, init_args: {scales: [0.0, 1.0]}}]\n"
    )
    for words in (
        whole.words("offline"),
        ["validate", *flags],
        ["predict", *flags],
        ["probe", f"{cut.path}@step-24", "--config", str(probing)],
        ["runs", "show", str(cut.path)],
    ):
        done, _ = offline(*words)
        assert done.returncode == 0, done.stderr
    whole.assert_same_result(cut)


@pytest.mark.faults
@pytest.mark.fault(
    "F32", "network cut: all subcommands finish; a missing model is an error within 10 s of the imports"
)
def test_missing_model_is_an_error_soon(whole: Whole) -> None:
    refused, imports_alone = offline(
        "fit", "--config", str(whole.config), "--run.resume", "must", "--run.name", "x9"
    )
    assert refused.returncode == 2
    done, seconds = offline(*whole.words("absent"), "--model.base.path", "nobody/nothing-of-this-name")
    assert done.returncode == 2
    assert "could not load a" in done.stderr
    assert "nobody/nothing-of-this-name" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < imports_alone + 10
