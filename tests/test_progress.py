"""Progress of a fit: a bar on a terminal, lines elsewhere, both in optimizer steps."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_em import progress
from lightning_em.progress import Progress


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch).sum()
        self.log_dict({"loss_here": loss.detach(), "not_computed": float("nan")}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(folder, *callbacks, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(Line(), DataLoader(torch.full((6, 1), 2.0)))


@pytest.fixture
def lines(caplog, tmp_path):
    """Fit with the given trainer arguments and give the progress lines."""

    def lines_of(bar=True, **options):
        caplog.clear()
        with caplog.at_level("INFO", logger="lightning_em"):
            fit(tmp_path, Progress(bar), **options)
        return [record.message for record in caplog.records if record.name == "lightning_em.progress"]

    return lines_of


@pytest.mark.filterwarnings("ignore")
def test_each_line_says_how_far_a_fit_is(lines, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    found = lines(max_epochs=2)
    assert len(found) == 12
    assert re.fullmatch(r"step 3/12: loss_here 2, not_computed -, \d+ s left", found[2])
    assert found[-1] == "step 12/12: loss_here 2, not_computed -"
    found = lines(max_steps=2, max_epochs=-1, accumulate_grad_batches=2)
    assert [line.partition(":")[0] for line in found] == ["step 1/2", "step 2/2"]


@pytest.mark.filterwarnings("ignore")
def test_a_short_fit_has_one_line_with_the_time_left(lines):
    [line] = lines(max_epochs=1)
    assert line.startswith("step 3/6: ")


@pytest.mark.filterwarnings("ignore")
def test_a_terminal_has_a_bar_and_messages_above_it(lines, monkeypatch, tmp_path):
    class Talk(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                logging.getLogger("talk").warning("a message")
                assert not handler.stream.getvalue().endswith("a message\n"), (
                    "the bar is drawn again below it"
                )

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger("talk").addHandler(handler)
    try:
        assert lines(max_epochs=1) == []
        fit(tmp_path, Progress(), Talk(), max_epochs=2)
    finally:
        logging.getLogger("talk").removeHandler(handler)
    shown = terminal.getvalue()
    assert "step 12/12" in shown
    assert "loss_here 2, not_computed -" in shown
    assert "Epoch" not in shown
    assert re.search(r"(\x1b\[2K|\r)a message *\r?\n", shown), "the message has a line of its own"
    assert handler.stream is terminal
    assert sys.stderr is terminal
    assert lines(bar=False, max_epochs=1) != [], "without a bar there are lines"


@pytest.mark.filterwarnings("ignore")
def test_the_time_left_counts_the_pauses(monkeypatch, tmp_path):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    left = []

    class Clock(Callback):
        """One second a step, and a pause of 20 seconds after the fourth."""

        def on_train_batch_start(self, *_):
            clock.now += 1.0

        def on_train_batch_end(self, trainer, module, *_):
            left.append(shown._time_left())
            if trainer.global_step == 4:
                shown.on_checkpoint_published(trainer, module, 4)
                clock.now += 20.0

    monkeypatch.setattr(progress, "time", clock)
    shown = Progress()
    fit(tmp_path, shown, Clock(), max_steps=10, max_epochs=-1)
    assert left[:3] == ["9 s left", "8 s left", "7 s left"]
    assert left[4] == "25 s left", "five steps of one second, and 20 seconds of pauses every five steps"
    assert left[-1] == ""
