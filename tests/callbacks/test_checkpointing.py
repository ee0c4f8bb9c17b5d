"""When checkpoints are written, which are kept, and that training is unaffected by what is kept."""

import pytest

from lightning_em.callbacks import AdapterCheckpoint
from tests.fitting import experiment, final_adapter, fit, write_config


def test_due_steps() -> None:
    dense = AdapterCheckpoint(every_n_steps=20, dense_until=10, dense_every=5)
    assert [step for step in range(61) if dense.due(step)] == [5, 10, 20, 40, 60]
    assert not any(AdapterCheckpoint(every_n_steps=0).due(step) for step in range(100))


@pytest.mark.parametrize(
    "settings", [{"every_n_steps": -1}, {"keep_last": 0}, {"dense_every": 0}, {"dense_until": -1}]
)
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="change the keys under checkpoint"):
        AdapterCheckpoint(**settings)


def test_keep_last_keeps_the_newest_and_the_same_result(tmp_path, tiny_model_folder, chat_file) -> None:
    config = experiment(
        tiny_model_folder(), chat_file, trainer={"max_epochs": 1}, checkpoint={"every_n_steps": 1}
    )
    path = write_config(tmp_path / "experiment.yaml", config)
    every, last = fit(path, "every"), fit(path, "last", "--checkpoint.keep_last", "2")
    assert every.steps() == [1, 2, 3, 4, 5]
    assert last.steps() == [4, 5]
    assert final_adapter(every) == final_adapter(last)
    assert sorted(p.name for p in last.checkpoints.iterdir()) == ["step-000004", "step-000005"]
