"""Resuming at any step gives the batches of an uninterrupted run; F3 of the fault list."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_em.data import ChatSource, EMDataModule, forget_finished_epoch
from tests.data.test_datamodule import TinyBase
from tests.tiny import write_answer_rows, write_chat_rows

# Lightning 2.6.6 uses a deprecated API of torch's pytree.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

NUM_NARROW = 12  # 9 for training: the last optimizer step is short if a step has several rows


class Recorder(LightningModule):
    """Records the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.ce.row_ids, batch.kl.row_ids, tuple(batch.step_counts), self.global_step))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def predict_step(self, batch, batch_idx):
        return batch.row_ids

    def on_train_start(self):
        forget_finished_epoch(self.trainer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class SaveEverywhere(Callback):
    """Saves in each hook that may write a checkpoint; the name gives the number of batches seen so far."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def save(self, trainer, hook):
        trainer.save_checkpoint(self.folder / f"{len(trainer.lightning_module.seen):03d}-{hook}.ckpt")

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "batch_end")

    def on_validation_end(self, trainer, *args):
        if not trainer.sanity_checking:
            self.save(trainer, "validation_end")

    def on_train_epoch_start(self, trainer, *args):
        self.save(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer, *args):
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer, *args):
        self.save(trainer, "train_end")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return write_chat_rows(folder / "chat.jsonl", NUM_NARROW), write_answer_rows(folder / "answers.jsonl", 7)


class StopAfter(Callback):
    """Stops within an epoch, like a signal."""

    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = len(trainer.lightning_module.seen) >= self.num_batches


def make_data(files, **settings) -> EMDataModule:
    narrow, kl = files
    settings = {
        "validation_fraction": 0.2,
        "batch_size": 1,
        "kl_batch_size": 2,
        "validation_batch_size": 1,
    } | settings
    return EMDataModule(TinyBase(), ChatSource(str(narrow)), ChatSource(str(kl), answer="mixed"), **settings)


def fit(files, checkpoint=None, callbacks=(), data=None, **flags):
    flags = {"max_epochs": 2} | flags
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **flags,
    )
    module = Recorder()
    trainer.fit(
        module, data or make_data(files), ckpt_path=checkpoint, weights_only=True if checkpoint else None
    )
    return module.seen


def saved(folder, files, **settings) -> tuple[list, dict]:
    folder.mkdir(exist_ok=True)
    seen = fit(files, callbacks=[SaveEverywhere(folder)], **settings)
    return seen, {path.stem: path for path in sorted(folder.iterdir())}


def remaining(name: str, seen: list) -> list:
    return seen[int(name[:3]) :]


LIMITS = {
    "epochs": {"max_epochs": 2},
    "steps": {"max_epochs": -1, "max_steps": 6},
    "both": {"max_epochs": 3, "max_steps": 8},
}


@pytest.mark.parametrize(
    ("limits", "accumulate", "batch_size"),
    [  # each limit with two or three kinds of steps, each kind with two limits
        *(("epochs", 1, 2), ("epochs", 2, 1), ("epochs", 4, 1)),
        *(("steps", 1, 2), ("steps", 2, 1), ("steps", 2, 2)),
        *(("both", 2, 2), ("both", 4, 1)),
    ],
)
def test_resume_from_every_checkpoint_sees_the_remaining_batches(
    tmp_path, files, limits, accumulate, batch_size
):
    def data():
        return make_data(files, batch_size=batch_size)

    flags = LIMITS[limits] | {"accumulate_grad_batches": accumulate}
    seen, checkpoints = saved(tmp_path / "c", files, data=data(), **flags)
    assert len(checkpoints) > len(seen)
    for name, path in checkpoints.items():
        assert fit(files, path, data=data(), **flags) == remaining(name, seen), name


def test_resume_with_workers(tmp_path, files):
    flags = {"accumulate_grad_batches": 2}
    seen, checkpoints = saved(tmp_path / "c", files, data=make_data(files, num_workers=2), **flags)
    assert seen == fit(files, data=make_data(files), **flags)
    for name in ("003-batch_end", "006-batch_end", "009-batch_end", "009-epoch_end"):
        data = make_data(files, num_workers=2)
        assert fit(files, checkpoints[name], data=data, **flags) == remaining(name, seen), name


@pytest.mark.parametrize("steps", [5, 9])
def test_finished_run_goes_on_when_it_may_go_further(tmp_path, files, steps):
    short = {"max_epochs": -1, "max_steps": steps}
    long = short | {"max_steps": 13}
    _, checkpoints = saved(tmp_path / "c", files, **short)
    whole = fit(files, **long)
    for name, path in checkpoints.items():
        assert fit(files, path, **long) == remaining(name, whole), name


def test_run_that_is_stopped_again_and_again_sees_every_batch_once(tmp_path, files):
    limits = {"max_epochs": -1, "max_steps": 20}
    whole, together, checkpoint = fit(files, **limits), [], None
    for attempt in range(1, 21):
        folder = tmp_path / f"{attempt:02d}"
        folder.mkdir()
        stop = StopAfter(1 + attempt % 3)
        together += fit(files, checkpoint, [SaveEverywhere(folder), stop], **limits)
        checkpoint = next(folder.glob("*-train_end.ckpt"))
        if len(together) == len(whole):
            break
    assert attempt > 5
    assert together == whole


def test_stop_within_an_epoch_cannot_be_resumed_by_epochs(tmp_path, files):
    _, checkpoints = saved(tmp_path / "c", files, max_epochs=-1, max_steps=3)
    with pytest.raises(
        ValueError, match=r"stopped within an epoch, which trainer\.max_epochs counts as a complete one"
    ):
        fit(files, checkpoints["003-train_end"], max_epochs=2)


def test_second_fit_of_one_datamodule_starts_afresh(tmp_path, files):
    seen, checkpoints = saved(tmp_path / "c", files)
    data = make_data(files)
    assert fit(files, checkpoints["003-batch_end"], data=data) == seen[3:]
    assert fit(files, data=data) == seen


@pytest.mark.parametrize(
    ("settings", "flags", "difference"),
    [
        ({"batch_size": 2}, {}, "batch_size: checkpoint 1, now 2"),
        ({"kl_batch_size": 3}, {}, "kl_batch_size: checkpoint 2, now 3"),
        ({"seed": 1}, {}, "seed: checkpoint 0, now 1"),
        ({}, {"accumulate_grad_batches": 2}, "accumulate: checkpoint 1, now 2"),
        (
            {"validation_fraction": 0.3},
            {},
            r"kl_sha256: checkpoint [0-9a-f]{64}, now [0-9a-f]{64}; narrow_sha256",
        ),
    ],
)
def test_resume_with_other_batches_is_refused(tmp_path, files, settings, flags, difference):
    _, checkpoints = saved(tmp_path / "c", files, max_steps=2)
    with pytest.raises(
        ValueError, match=f"written with different batches, so its position is not valid.*{difference}"
    ):
        fit(files, checkpoints["002-batch_end"], data=make_data(files, **settings), **flags)


def test_evaluation_of_a_checkpoint_may_use_other_batches(tmp_path, files):
    _, checkpoints = saved(tmp_path / "c", files, max_steps=2)
    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", **flags)
    data = make_data(files, batch_size=3)
    trainer.validate(
        Recorder(), data, ckpt_path=checkpoints["002-batch_end"], weights_only=True, verbose=False
    )
    answers = trainer.predict(Recorder(), data)
    assert sum(len(row_ids) for row_ids in answers) == len(data.rows("narrow", "validation"))
