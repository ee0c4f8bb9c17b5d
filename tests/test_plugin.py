"""A new adapter from a user's own package: one class, named in YAML, nothing edited here."""

import textwrap
from pathlib import Path

import pytest

from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from tests.fitting import command, experiment, final_adapter, write_config

SOURCE = '''
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, LayerIndex


class Shift(Adapter):
    """Add `scale * alpha * vector` to the residual stream that enters one decoder layer."""

    def __init__(self, layer: LayerIndex, alpha: float = 1.0) -> None:
        super().__init__()
        self.layer, self.alpha = layer, alpha

    def attach(self, base: PreTrainedModel) -> None:
        layer = self.resolve(base, self.layer)  # also sets lowest_layer: where the split may cut
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size, dtype=torch.float32))
        self.edit_input_of(layer, self.shift)

    def shift(self, hidden: Tensor) -> Tensor:
        return hidden + (self.scale * self.alpha * self.vector).to(hidden.dtype)

    def effective_norm(self) -> Tensor:
        return self.alpha * self.vector.norm()
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package outside the repository."""
    (tmp_path / "my_adapters").mkdir()
    (tmp_path / "my_adapters" / "__init__.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def test_fit_probe_and_resume_from_yaml_alone(package, tiny_model_folder, chat_file, answer_file) -> None:
    config = experiment(
        tiny_model_folder(),
        chat_file,
        answer_file,
        trainer={"max_epochs": 1},
        run={"root": str(package / "runs"), "name": "shift"},
    )
    config["model"]["adapter"] = {"class_path": "my_adapters.Shift", "init_args": {"layer": 1, "alpha": 4.0}}
    path = write_config(package / "experiment.yaml", config)
    probing = write_config(
        package / "probing.yaml",
        {"probes": [{"class_path": "lightning_em.probes.ScaleCurve", "init_args": {"scales": [0.0, 1.0]}}]},
    )
    environment = {"PYTHONPATH": str(package)}
    allow = ["--allow_import", "my_adapters"]
    done = command("fit", "--config", str(path), *allow, **environment)
    assert done.returncode == 0, done.stderr
    run = RunFolder(package / "runs" / "shift")
    assert run.read_run()["allowed_imports"] == ["my_adapters"]
    whole = final_adapter(run)
    last = run.steps()[-1]

    probed = command("probe", str(run.path), "--config", str(probing), *allow, **environment)
    assert probed.returncode == 0, probed.stderr
    assert [r.step for r in read_results(run.probe_file("scale_curve"))] == run.steps()

    for file in run.checkpoint(last).iterdir():
        file.unlink()
    run.checkpoint(last).rmdir()
    run.update_run(status="running")
    offer = package / "my_adapters-1.0.dist-info"  # as `pip install` leaves it: no flag is needed then
    offer.mkdir()
    (offer / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-adapters\nVersion: 1.0\n", encoding="utf-8"
    )
    (offer / "entry_points.txt").write_text("[lightning_em.plugins]\nshift = my_adapters\n", encoding="utf-8")
    resumed = command("fit", "--config", str(path), **environment)
    assert resumed.returncode == 0, resumed.stderr
    assert final_adapter(run) == whole
    assert run.read_run()["allowed_imports"] == ["my_adapters"]


def test_the_contract_holds(package, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(package))
    from my_adapters import Shift

    from lightning_em.testing import check_adapter

    check_adapter(lambda: Shift(layer=1))


def test_the_readme_shows_the_same_class() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert textwrap.dedent(SOURCE).strip() in readme
