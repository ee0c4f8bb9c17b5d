"""Progress lines of a fit whose progress bar nobody sees."""

import re
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_em import progress
from lightning_em.progress import LogProgress


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch).sum()
        self.log("loss_here", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture
def lines(caplog, monkeypatch, tmp_path):
    """Fit with the given trainer arguments and give the progress lines."""

    def fit(is_terminal=False, **options):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[LogProgress()],
            **options,
        )
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning_em"):
            trainer.fit(Line(), DataLoader(torch.full((6, 1), 2.0)))
        return [record.message for record in caplog.records if record.name == "lightning_em.progress"]

    return fit


@pytest.mark.filterwarnings("ignore")
def test_each_line_says_how_far_a_fit_is(lines, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    found = lines(max_epochs=2)
    assert len(found) == 12
    assert re.fullmatch(r"batch 3 of 12, loss_here 2\.000, \d+ s left", found[2])
    assert lines(max_steps=2, max_epochs=-1, accumulate_grad_batches=2)[-1].startswith("batch 4 of 4")


@pytest.mark.filterwarnings("ignore")
def test_a_terminal_has_its_bar_and_a_short_fit_no_line(lines, monkeypatch):
    assert lines(max_epochs=1) == []
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert lines(is_terminal=True, max_epochs=1) == []
