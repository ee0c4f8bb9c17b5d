"""F15: a loss that is NaN or infinite."""

import re

import pytest

from lightning_em.data import read_rows
from tests.faults.conftest import Case, Whole

POISON = (
    "--allow_import", "tests",
    "--trainer.callbacks+=tests.faults.inject.Poison", "--trainer.callbacks.init_args.step=3",
    "--checkpoint.every_n_steps", "1",
)  # fmt: skip


@pytest.mark.fault(
    "F15", "NaN loss at step 3: stops there with row ids, no NaN checkpoint, non-zero exit, no loop"
)
def test_nan_loss(whole: Whole, case: Case, chat_file, answer_file) -> None:
    run = case.folder("poisoned")
    done = case.fit("poisoned", *POISON)
    assert done.code == 1
    assert "the loss is NaN or infinite at step 3" in done.output
    named = re.search(r"Rows of the step on rank 0: narrow ([\w, -]+); kl ([\w, -]+)\.", done.output)
    for ids, file in zip(named.groups(), (chat_file, answer_file), strict=True):
        assert len(set(ids.split(", "))) == 6
        assert set(ids.split(", ")) <= {row.id for row in read_rows(str(file))}
    assert "Traceback" not in done.output
    assert run.steps() == [1, 2]
    record = run.read_run()
    assert record["status"] == "failed"
    assert record["attempts"][-1]["failed_at"] == 3
    again = case.fit("poisoned", *POISON)
    assert again.code == 1
    assert "1 earlier attempt ended at this same step" in again.output
    assert run.steps() == [1, 2]
    repaired = case.fit("poisoned", "--checkpoint.every_n_steps", "4")
    assert repaired.code == 0, repaired.output
    whole.assert_same_result(run)


@pytest.mark.fault(
    "F15", "NaN loss at step 3: stops there with row ids, no NaN checkpoint, non-zero exit, no loop"
)
def test_exploding_weights(case: Case) -> None:
    run = case.folder("exploding")
    done = case.fit("exploding", "--model.optimizer.init_args.lr", "1e38", "--checkpoint.every_n_steps", "1")
    assert done.code == 1
    assert "is NaN or infinite at step" in done.output
    assert run.read_run()["status"] == "failed"
