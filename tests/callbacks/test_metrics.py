"""The metrics file can be watched while a run lasts, and loses and repeats nothing."""

import os

import pytest

from lightning_em.callbacks import AdapterCheckpoint, MetricsFile, metrics
from lightning_em.callbacks.metrics import HEADER
from lightning_em.records import read_metrics
from lightning_em.runs import RunFolder
from tests.fitting import cut_after, experiment, fit, metrics_of, write_config


def test_values_reach_the_file_without_a_checkpoint(tmp_path, monkeypatch) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train/ce": 1.5}, step=1)
    assert not file.path.exists(), "one write per value would slow training down"
    monkeypatch.setattr(metrics, "_SECONDS_BETWEEN_WRITES", 0.0)
    file.log_metrics({"train/ce": 1.25}, step=2)
    assert read_metrics(file.path) == {1: {"train/ce": 1.5}, 2: {"train/ce": 1.25}}


def test_a_failed_write_loses_and_repeats_nothing(tmp_path, monkeypatch, caplog) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    file = MetricsFile(tmp_path / "metrics.csv")
    monkeypatch.setattr(metrics, "_SECONDS_BETWEEN_WRITES", 0.0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        file.log_metrics({"train/ce": 1.0}, step=1)
        assert "No space left on device" in caplog.text
        with pytest.raises(OSError, match="No space left"):
            file.save()
    file.log_metrics({"train/ce": 2.0}, step=2)
    assert file.path.read_text() == "", "one warning is enough: the next checkpoint tries again"
    file.save()
    file.log_metrics({"train/ce": 3.0}, step=3)
    expected = [HEADER, "1,train/ce,1.0", "2,train/ce,2.0", "3,train/ce,3.0"]
    assert file.path.read_text().splitlines() == expected


def test_a_watched_run_resumes_to_the_same_file(
    tmp_path, monkeypatch, tiny_model_folder, chat_file, answer_file
) -> None:
    seen = []
    publish = AdapterCheckpoint.publish

    def watch(self, trainer, *args, **kwargs):
        seen.append(max(read_metrics(RunFolder(trainer.default_root_dir).metrics_file)))
        return publish(self, trainer, *args, **kwargs)

    monkeypatch.setattr(AdapterCheckpoint, "publish", watch)
    monkeypatch.setattr(metrics, "_SECONDS_BETWEEN_WRITES", 0.0)
    config = experiment(tiny_model_folder(), chat_file, answer_file, checkpoint={"every_n_steps": 3})
    path = write_config(tmp_path / "experiment.yaml", config)
    whole = fit(path, "whole")
    assert seen == [3, 6, 9, 12, 15], "every step is in the file before its checkpoint is written"
    cut = cut_after(whole, 6, tmp_path / "cut")
    fit(path, "cut")
    assert metrics_of(cut) == metrics_of(whole)
    keys = [line.rsplit(",", 1)[0] for line in cut.metrics_file.read_text().splitlines()]
    assert len(keys) == len(set(keys))
