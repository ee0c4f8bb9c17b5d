"""Packed batches: what counts, where rows start, and the padded view."""

import pytest
import torch

from lightning_em.batch import (
    EncodedRow,
    PackedBatch,
    StepCounts,
    TrainBatch,
    concat,
    single_rows,
    token_batches,
)
from tests import oracle
from tests.samples import make_rows, pack

ROWS = make_rows(5, 1, 12, 9)


@pytest.mark.parametrize("kind", ["response", "all"])
def test_counted_positions_are_those_of_each_row_alone(kind) -> None:
    counted = pack(ROWS).counted(kind).split([5, 1, 12, 9])
    for mask, (ids, flags) in zip(counted, ROWS, strict=True):
        expected = [kind == "all" or (t + 1 < len(ids) and flags[t + 1]) for t in range(len(ids))]
        assert mask.tolist() == expected
        assert mask.sum() == oracle.count((ids, flags), kind)


def test_no_row_predicts_the_next_rows_first_token() -> None:
    batch = PackedBatch.from_rows(
        [EncodedRow([1, 2], [True, True], "a"), EncodedRow([3, 4], [True, True], "b")]
    )
    assert batch.counted("response").tolist() == [True, False, True, False]
    assert batch.targets()[batch.counted("response")].tolist() == [2, 4]


def test_a_dummy_counts_nothing() -> None:
    batch = pack(ROWS)
    dummy = batch.dummy()
    for kind in ("response", "all"):
        assert not dummy.counted(kind).any()
        assert not dummy.to("cpu").counted(kind).any()
    assert torch.equal(dummy.input_ids, batch.input_ids)
    assert batch.counted("all").all()


def test_layout() -> None:
    batch = pack(ROWS)
    assert batch.num_rows == 4
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 18, 27]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.positions.tolist() == [*range(5), 0, *range(12), *range(9)]
    assert batch.row_of_token().tolist() == [0] * 5 + [1] + [2] * 12 + [3] * 9
    assert batch.row_ids == ("row-0", "row-1", "row-2", "row-3")


def test_the_layout_is_made_once_and_belongs_to_the_batch() -> None:
    batch = pack(ROWS)
    with torch.inference_mode():  # validation may be the first to ask
        batch.positions, batch.cu_seqlens  # noqa: B018
    assert batch.positions is batch.positions
    assert not batch.positions.is_inference()
    assert not batch.cu_seqlens.is_inference()
    assert batch.select([2, 0]).positions.tolist() == [*range(12), *range(5)]
    assert batch.to("meta").cu_seqlens.device.type == "meta"


def test_concatenated_single_rows_are_the_batch() -> None:
    batch = pack(ROWS)
    rows = single_rows(batch)
    assert [row.lengths for row in rows] == [(5,), (1,), (12,), (9,)]
    again = concat(rows)
    assert torch.equal(again.input_ids, batch.input_ids)
    assert torch.equal(again.response_mask, batch.response_mask)
    assert (again.lengths, again.row_ids) == (batch.lengths, batch.row_ids)
    assert concat(single_rows(batch.dummy())).is_dummy


def test_padded_holds_the_same_rows() -> None:
    batch = pack(ROWS)
    rows = batch.padded(pad_id=7)
    assert rows.input_ids.shape == rows.attention_mask.shape == (4, 12)
    assert torch.equal(rows.input_ids[rows.attention_mask.bool()], batch.input_ids)
    assert rows.input_ids[~rows.attention_mask.bool()].eq(7).all()
    assert rows.attention_mask.sum(1).tolist() == [5, 1, 12, 9]


@pytest.mark.parametrize("rows", [[], [EncodedRow([], [], "empty")]])
def test_a_batch_without_tokens_is_refused(rows) -> None:
    with pytest.raises(ValueError, match="a batch needs rows with tokens, got"):
        PackedBatch.from_rows(rows)


def test_a_train_batch_moves_with_both_streams() -> None:
    batch = TrainBatch(pack(ROWS), pack(ROWS), StepCounts(1, 2, 3)).to("meta")
    assert batch.ce.input_ids.device.type == batch.kl.input_ids.device.type == "meta"
    assert TrainBatch(pack(ROWS), None, StepCounts(1, 0, 0)).to("meta").kl is None


def test_selected_rows_are_those_rows_in_that_order() -> None:
    rows = [
        EncodedRow([1, 2], [False, True], "a"),
        EncodedRow([3, 4, 5], [False, True, True], "b"),
        EncodedRow([6], [True], "c"),
    ]
    batch = PackedBatch.from_rows(rows)
    picked, wanted = batch.select([2, 0]), PackedBatch.from_rows([rows[2], rows[0]])
    assert torch.equal(picked.input_ids, wanted.input_ids)
    assert torch.equal(picked.response_mask, wanted.response_mask)
    assert (picked.lengths, picked.row_ids) == (wanted.lengths, wanted.row_ids)


@pytest.mark.parametrize(
    ("limit", "groups"), [(0, [[5], [3], [4], [9]]), (8, [[5, 3], [4], [9]]), (99, [[5, 3, 4, 9]])]
)
def test_token_batches_fill_a_limit_and_keep_their_order(limit, groups) -> None:
    batches = [pack(make_rows(length)) for length in (5, 3, 4, 9)]
    found = list(token_batches(iter(batches), limit))
    assert [[batch.lengths[0] for batch in group] for group in found] == groups
    assert all(
        one is other for one, other in zip((b for group in found for b in group), batches, strict=True)
    )
    assert list(token_batches([], limit)) == []
