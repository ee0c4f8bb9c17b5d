"""Checkpoint folders load everywhere, and loading one never runs code."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_em.checkpoints import FolderCheckpointIO

STATE = {
    "state_dict": {"vector": torch.arange(4.0)},
    "adapter_config": {"class_path": "x"},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}}],
    "epoch": 1,
}


def test_round_trip(tmp_path) -> None:
    io, folder = FolderCheckpointIO(), tmp_path / "step-000001"
    io.save_checkpoint(STATE, folder)
    loaded = io.load_checkpoint(folder)
    assert torch.equal(loaded["state_dict"]["vector"], STATE["state_dict"]["vector"])
    assert torch.equal(loaded["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(4))
    assert loaded["adapter_config"] == STATE["adapter_config"]
    assert loaded["epoch"] == 1
    assert load_file(folder / "adapter_model.safetensors").keys() == {"vector"}
    io.remove_checkpoint(folder)
    assert list(tmp_path.iterdir()) == []


def test_state_that_could_not_be_loaded_safely_is_refused_at_once(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded safely on resume"):
        FolderCheckpointIO().save_checkpoint(STATE | {"callback": pytest.fail}, tmp_path / "step-000001")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="step-000001"):
        FolderCheckpointIO().save_checkpoint(STATE, tmp_path / "checkpoints" / "step-000001")
