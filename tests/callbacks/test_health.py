"""Conditions that stop a run, other than NaN, which tests/faults covers."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.records import read_metrics
from tests.fitting import experiment, fit, write_config


class HalfUsed(Adapter):
    """Two parameters; the loss depends on one of them, or on none."""

    def __init__(self, connected: bool = True) -> None:
        super().__init__()
        self.connected = connected

    def attach(self, base: PreTrainedModel) -> None:
        size = base.config.get_text_config(decoder=True).hidden_size
        self.used = nn.Parameter(torch.zeros(size))
        if self.connected:
            self.idle = nn.Parameter(torch.zeros(size))
        self.edit_input_of(1, self.shift)

    def shift(self, hidden: Tensor) -> Tensor:
        used = self.used if self.connected else self.used * 0
        return hidden + (self.scale * used).to(hidden)


@pytest.mark.parametrize(
    ("connected", "message"),
    [(True, r"does not depend on \['idle'\]"), (False, "every gradient of the adapter is exactly zero")],
)
def test_a_tensor_that_is_not_trained_is_refused(
    tmp_path, tiny_model_folder, chat_file, connected, message
) -> None:
    config = experiment(tiny_model_folder(), chat_file)
    config["model"]["adapter"] = {
        "class_path": "tests.callbacks.test_health.HalfUsed",
        "init_args": {"connected": connected},
    }
    path = write_config(tmp_path / "experiment.yaml", config)
    with pytest.raises(ValueError, match=message):
        fit(path, "half", "--allow_import", "tests")


def test_pace_is_logged_at_every_step(tmp_path, tiny_model_folder, chat_file) -> None:
    config = experiment(tiny_model_folder(), chat_file, trainer={"max_epochs": 1})
    table = read_metrics(fit(write_config(tmp_path / "experiment.yaml", config), "run").metrics_file)
    for step in range(1, 6):
        assert table[step]["train/tokens_per_second"] > 0
        assert table[step]["train/memory_bytes"] > 1e6
        assert table[step]["train/gradient_norm"] > 0
        assert table[step]["train/effective_norm"] >= 0
