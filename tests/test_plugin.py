"""A new adapter and a new probe from a user's own package: one class each, named in YAML, nothing edited here."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LowRank
from lightning_em.analysis import last_update, norms_by_step, rotation, trajectory_pca, update_cosine
from lightning_em.manifest import publish
from lightning_em.probes.displacement import displacement_from_here
from lightning_em.records import read_results
from lightning_em.runs import RunFolder
from lightning_em.testing import check_adapter, check_probe
from lightning_em.testing.samples import small_base
from tests.fitting import command, experiment, final_adapter, write_config

SOURCE = '''
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, LayerIndex, LowRank


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

    def update(self) -> list[LowRank]:  # the norm, cosines, trajectories and exports are computed from it
        return [LowRank(self.lowest_layer, "vector", factor=self.alpha)]
'''

WEIGHT = '''
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter, LayerIndex, LowRank, decoder_layers


class Column(Adapter):
    """Add `scale * alpha * b @ a` to the weight of one down projection."""

    def __init__(self, layer: LayerIndex, alpha: float = 1.0) -> None:
        super().__init__()
        self.layer, self.alpha = layer, alpha

    def attach(self, base: PreTrainedModel) -> None:
        linear = decoder_layers(base)[self.resolve(base, self.layer)].mlp.down_proj
        self.site = next(name for name, module in base.named_modules() if module is linear)
        a = torch.randn(1, linear.in_features, generator=self.generator)  # drawn from the run's seed
        self.a = nn.Parameter(a / linear.in_features**0.5)  # [rank, in]
        self.b = nn.Parameter(torch.zeros(linear.out_features, 1))  # [out, rank]
        linear.register_forward_hook(self.add)

    def add(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.scale == 0:  # then the model is its base to the bit
            return output
        change = self.scale * self.alpha * args[0].float() @ self.a.T @ self.b.T
        return output + change.to(output.dtype)

    def update(self) -> list[LowRank]:
        return [LowRank(self.site, write="b", read="a", factor=self.alpha)]
'''

PROBE = '''
from functools import partial
from typing import Any

from lightning_em.models import AdaptedModel
from lightning_em.probes import Probe, ProbeExamples, RowMeans
from lightning_em.records import Point, Quantity


class Beyond(Probe):
    """Change of the training loss with the update scaled beyond the trained one."""

    name = "beyond"
    quantities = (Quantity("ce_change", "nats_per_token", ("scale",)),)
    grid = ("scales",)  # another choice of scales measures the same curve
    reads = ("narrow",)

    def __init__(self, scales: list[float]) -> None:
        self.scales = scales

    def settings(self) -> dict[str, Any]:
        return {"scales": self.scales}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        states = [partial(model.adapter.at_scale, scale) for scale in (1.0, *self.scales)]
        trained, *further = RowMeans.of_ce(model, examples.narrow, states)
        changes = zip(self.scales, further, strict=True)
        return [(means - trained).point("ce_change", {"scale": scale}) for scale, means in changes]
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package outside the repository."""
    (tmp_path / "my_adapters").mkdir()
    (tmp_path / "my_adapters" / "__init__.py").write_text(SOURCE + WEIGHT + PROBE, encoding="utf-8")
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
    from my_adapters import Beyond, Column, Shift

    check_adapter(lambda: Shift(layer=1))
    check_adapter(lambda: Column(layer=1, alpha=4.0))
    check_probe(Beyond([1.5, 2.0]))


def test_the_documentation_shows_the_same_classes() -> None:
    repository = Path(__file__).parent.parent
    assert SOURCE.strip() in (repository / "README.md").read_text(encoding="utf-8")
    contributing = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert WEIGHT.strip() in contributing
    assert PROBE.strip() in contributing


class Product(Adapter):
    """A low-rank change of one weight, made without peft."""

    def attach(self, base):
        self.resolve(base, 1)
        self.site = "model.layers.1.mlp.down_proj"
        module = base.get_submodule(self.site)
        size_out, size_in = module.weight.shape
        self.down = nn.Parameter(torch.randn(2, size_in, generator=self.generator) / size_in**0.5)
        self.up = nn.Parameter(torch.zeros(size_out, 2))
        module.register_forward_hook(self.edit)

    def edit(self, _module, args, output):
        if self.scale == 0:
            return output
        return output + (self.scale * 3 * args[0].float() @ self.down.T @ self.up.T).to(output)

    def update(self):
        return [LowRank(self.site, "up", "down", 3.0)]


def test_low_rank_parts_give_norm_displacement_rotation_components_and_cosines(
    package, monkeypatch, tmp_path
) -> None:
    monkeypatch.syspath_prepend(str(package))
    from my_adapters import Shift

    for make, whole in (
        (lambda: Shift(layer=1, alpha=4.0), lambda a: 4 * a.vector),
        (Product, lambda a: 3 * a.up @ a.down),
    ):
        check_adapter(make)
        runs, ends = {}, {}
        for name, seed in (("general", 0), ("narrow", 1)):
            adapter = make()
            adapter.bind(small_base(), 0)
            generator, run = (
                torch.Generator().manual_seed(seed),
                RunFolder(tmp_path / type(adapter).__name__ / name),
            )
            for step in (1, 2, 3):
                distance, before = displacement_from_here(adapter), whole(adapter).detach().clone()
                for parameter in adapter.parameters():
                    parameter.data += torch.randn(parameter.shape, generator=generator)
                moved = (whole(adapter) - before).norm().item()
                assert distance() == pytest.approx(moved, rel=1e-4)
                publish(run.checkpoint(step), adapter.save)
            assert adapter.effective_norm().item() == pytest.approx(whole(adapter).norm().item(), rel=1e-5)
            assert norms_by_step(run)[3] == pytest.approx(adapter.effective_norm().item(), rel=1e-5)
            assert [turn.step for turn in rotation(run)] == [2]
            runs[name], ends[name] = run, whole(adapter).detach().flatten()
        pca = trajectory_pca(runs)
        assert len(pca.coordinates) == 6
        assert pca.explained_shares[0] > 0
        cosine = update_cosine(*map(last_update, runs.values()))
        wanted = torch.nn.functional.cosine_similarity(*ends.values(), dim=0).item()
        assert cosine == pytest.approx(wanted, abs=1e-5)
