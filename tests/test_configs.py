"""Every config of the repository instantiates offline, without weights."""

from pathlib import Path

import pytest
import yaml

from lightning_em.data import EMDataModule
from lightning_em.experiment import Experiment
from lightning_em.module import EMModule

CONFIGS = Path(__file__).parent.parent / "configs"
# Studies are no part of an experiment: tests/study/test_plan.py plans and parses each.
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "study")
EXPERIMENTS = sorted((CONFIGS / "experiment").rglob("*.yaml"))
# Where a part's file goes in an experiment; debug files stand beside one.
PARTS = {
    "base": "model.base",
    "adapter": "model.adapter",
    "lr_scheduler": "model.lr_scheduler",
    "objective": "model.objective",
    "optimizer": "model.optimizer",
    "store": "model.store",
    "data": "data",
    "trainer": "trainer",
    "probing": "probing",
}


def instantiate(*args: str) -> Experiment:
    """Parse as `fit` does and make module, data and trainer, without running."""
    experiment = Experiment(args)
    experiment._make(())
    return experiment


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shipped configs need no particular current folder."""
    monkeypatch.chdir(tmp_path)


def test_there_are_configs_of_every_kind() -> None:
    assert len(EXPERIMENTS) >= 6
    assert {file.parent.name for file in FILES} >= {*PARTS, "experiment", "debug"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_config_instantiates_offline(file: Path) -> None:
    folder = file.relative_to(CONFIGS).parts[0]
    whole = str(EXPERIMENTS[0])
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    if folder == "experiment":
        made = instantiate("--config", str(file), *devices)
    elif folder == "debug":
        made = instantiate("--config", whole, "--config", str(file), *devices)
    else:
        made = instantiate("--config", whole, f"--{PARTS[folder]}", str(file), *devices)
    assert isinstance(made.module, EMModule)
    assert isinstance(made.data, EMDataModule)
    assert not hasattr(made.module, "model"), "weights were loaded while instantiating"


def test_experiments_only_refer_to_parts_that_exist() -> None:
    for file in EXPERIMENTS:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, value in (*config["model"].items(), ("data", config["data"])):
            if isinstance(value, str) and value.startswith("../"):
                assert (file.parent / value).is_file(), f"{file}: {name}"


def test_every_config_is_reloadable(tmp_path: Path) -> None:
    first = Experiment.from_yaml(EXPERIMENTS[0])
    (tmp_path / "config.yaml").write_text(first.config_text, encoding="utf-8")
    again = Experiment.from_yaml(tmp_path / "config.yaml")
    assert again.config | {"config": None} == first.config | {"config": None}
    assert again.identity == first.identity
