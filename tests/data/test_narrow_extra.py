"""Additional rows in the narrow stream, as used by the mixing arms of a study."""

import pytest

from lightning_em.data import ChatSource, EMDataModule
from tests.data.test_datamodule import TinyBase
from tests.tiny import answer_rows, write_rows


@pytest.fixture
def files(tmp_path):
    rows = [{**row, "id": f"row-{index}"} for index, row in enumerate(answer_rows(60))]
    narrow = write_rows(tmp_path / "narrow.jsonl", rows[:20])
    # the last three repeat questions of narrow rows
    return str(narrow), str(write_rows(tmp_path / "extra.jsonl", rows[20:] + rows[:3]))


def datamodule(files, validation_fraction=0.0, **extra):
    narrow, other = files
    data = EMDataModule(
        TinyBase(),
        ChatSource(narrow, "bad"),
        narrow_extra=ChatSource(other, "good", **extra),
        validation_fraction=validation_fraction,
    )
    data.setup("fit")
    return data


def test_extra_rows_train_beside_the_narrow_ones(files) -> None:
    data = datamodule(files, limit=30)
    alone = EMDataModule(TinyBase(), ChatSource(files[0], "bad"), validation_fraction=0.0)
    alone.setup("fit")
    rows = data.rows("narrow").rows
    assert len(rows) == 20 + 30
    assert rows[:20] == alone.rows("narrow").rows
    assert [row.row_id for row in rows[20:]] == [f"extra/row-{index}" for index in range(20, 50)]
    tokenizer, answers = data.base.load_tokenizer(), answer_rows(60)
    for index, row in enumerate(rows):
        kind = "bad" if index < 20 else "good"
        said = [token for token, answer in zip(row.input_ids, row.response_mask, strict=True) if answer]
        assert tokenizer.decode(said, skip_special_tokens=True) == answers[index][kind]
    seen = [row_id for batch in data.train_dataloader() for row_id in batch.ce.row_ids]
    assert sorted(seen) == sorted(row.row_id for row in rows)


def test_a_held_out_question_is_in_no_extra_row(files) -> None:
    data = datamodule(files, validation_fraction=0.5)
    held_out = {row.row_id for row in data.rows("narrow", "validation").rows}
    extra = {row.row_id.removeprefix("extra/") for row in data.rows("narrow").rows if "/" in row.row_id}
    assert len(held_out) == 10
    assert not held_out & extra
    shared = {f"row-{index}" for index in range(3)}
    assert extra & shared == shared - held_out
    assert held_out & shared  # otherwise the test would be vacuous


def test_the_file_is_on_record(files) -> None:
    data = datamodule(files)
    assert set(data.fingerprint()) == {"narrow.file", "narrow_extra.file", "narrow.train.tokens"}
