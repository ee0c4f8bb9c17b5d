"""The number of threads is a setting of the trainer, and nothing else changes it."""

import pytest
import torch
from lightning.pytorch import Callback

from lightning_em.callbacks import Threads
from lightning_em.experiment import Experiment
from lightning_em.models import BaseModel
from tests.fitting import experiment, write_config

THREADS = {"class_path": "lightning_em.callbacks.Threads", "init_args": {"num": 1}}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path, tiny_model_folder, chat_file):
    trainer = {"max_epochs": 1, "max_steps": 1, "callbacks": [THREADS]}
    return write_config(tmp_path / "config.yaml", experiment(tiny_model_folder(), chat_file, trainer=trainer))


def test_loading_a_model_of_the_miniature_changes_no_setting_of_the_process() -> None:
    BaseModel("miniature://seed-0/model").load_model()
    assert torch.get_num_threads() == 2


def test_a_fit_has_the_threads_of_its_trainer_from_loading_on(config, tmp_path, monkeypatch) -> None:
    seen = []
    load = BaseModel.load_model
    monkeypatch.setattr(
        BaseModel, "load_model", lambda base: seen.append(torch.get_num_threads()) or load(base)
    )
    start = Callback.on_train_batch_start
    monkeypatch.setattr(
        Threads,
        "on_train_batch_start",
        lambda *args: seen.append(torch.get_num_threads()) or start(*args),
        raising=False,
    )
    fitted = Experiment([f"--config={config}", f"--run.root={tmp_path}"])
    fitted.fit()
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
    fitted.validate()
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_the_number_is_restored_after_an_error(config, tmp_path, monkeypatch) -> None:
    def fail(*_):
        raise ArithmeticError("in the first batch")

    monkeypatch.setattr(Threads, "on_train_batch_start", fail, raising=False)
    with pytest.raises(ArithmeticError, match="in the first batch"):
        Experiment([f"--config={config}", f"--run.root={tmp_path}"]).fit()
    assert torch.get_num_threads() == 2


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num must be 1 or more, got 0; set init_args\.num of Threads"):
        Threads(0)
