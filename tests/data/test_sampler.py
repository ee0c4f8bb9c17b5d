from collections import Counter
from itertools import islice

import pytest

from lightning_em.batch import StepCounts
from lightning_em.data import BatchGeometry, RowCounts, StepSampler
from lightning_em.data.position import Regearing, same_steps

NUM_KL = 11
KL_RESPONSE = [3 + row for row in range(NUM_KL)]
KL_ALL = [20 + 2 * row for row in range(NUM_KL)]


NARROW_ALL = [9 + 5 * row % 17 for row in range(100)]


def sampler(
    num_narrow=23,
    batch_size=2,
    kl_batch_size=3,
    accumulate=1,
    world_size=1,
    rank=0,
    seed=0,
    kl=True,
    max_tokens=None,
    length_buckets=None,
):
    return StepSampler(
        RowCounts([5 + row % 4 for row in range(num_narrow)], NARROW_ALL[:num_narrow]),
        RowCounts(KL_RESPONSE, KL_ALL) if kl else RowCounts([], []),
        BatchGeometry(batch_size, kl_batch_size, accumulate, world_size, max_tokens, length_buckets),
        rank,
        seed,
    )


def steps_of(epoch=0, accumulate=1, world_size=1, **settings) -> list[tuple[list, list, StepCounts]]:
    """Return the rows of each optimizer step over all ranks, in order of their chunks, without dummy batches."""
    ranks = [
        sampler(accumulate=accumulate, world_size=world_size, rank=rank, **settings)
        for rank in range(world_size)
    ]
    for one in ranks:
        one.set_epoch(epoch)
    streams = [list(one) for one in ranks]
    assert len({len(stream) for stream in streams}) == 1
    found = []
    for first in range(0, len(streams[0]), accumulate):
        chunks = [
            c for step in zip(*(s[first : first + accumulate] for s in streams), strict=True) for c in step
        ]
        ce = [row for chunk in chunks if not chunk.ce_is_dummy for row in chunk.ce_rows]
        kl = [row for chunk in chunks if not chunk.kl_is_dummy for row in chunk.kl_rows]
        (counts,) = {chunk.step_counts for chunk in chunks}
        found.append((ce, kl, counts))
    return found


@pytest.mark.parametrize("num_narrow", [1, 2, 7, 8, 9, 15, 16, 17, 23])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size"),
    [(4, 1, 2), (4, 2, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1), (1, 1, 8), (2, 1, 4)],
)
def test_steps_depend_on_the_global_batch_alone(num_narrow, batch_size, accumulate, world_size):
    for epoch in range(2):
        reference = steps_of(epoch, num_narrow=num_narrow, batch_size=8, kl_batch_size=16)
        other = steps_of(
            epoch,
            num_narrow=num_narrow,
            batch_size=batch_size,
            kl_batch_size=2 * batch_size,
            accumulate=accumulate,
            world_size=world_size,
        )
        assert other == reference


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_every_narrow_row_comes_once_an_epoch(accumulate, world_size):
    for epoch in range(3):
        rows = [row for ce, _, _ in steps_of(epoch, accumulate, world_size) for row in ce]
        assert sorted(rows) == list(range(23))


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_kl_stream_goes_round_without_a_gap_over_epochs(accumulate, world_size):
    stream = [row for epoch in range(4) for _, kl, _ in steps_of(epoch, accumulate, world_size) for row in kl]
    for first in range(0, len(stream) - NUM_KL, NUM_KL):
        assert sorted(stream[first : first + NUM_KL]) == list(range(NUM_KL))


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_counts_are_those_of_the_whole_step(accumulate, world_size):
    for ce, kl, counts in steps_of(1, accumulate, world_size):
        assert counts.ce == sum(5 + row % 4 for row in ce)
        assert counts.kl_response == sum(KL_RESPONSE[row] for row in kl)
        assert counts.kl_all == sum(KL_ALL[row] for row in kl)


def test_micro_batch_of_a_full_step_is_a_contiguous_slice():
    geometry = {"batch_size": 2, "kl_batch_size": 3, "accumulate": 3, "world_size": 2}
    order = [row for ce, _, _ in steps_of(batch_size=12, kl_batch_size=18) for row in ce]
    for rank in range(2):
        for j, indices in enumerate(islice(sampler(rank=rank, **geometry), 3)):
            first = (j * 2 + rank) * 2
            assert indices.ce_rows == tuple(order[first : first + 2])
            assert (len(indices.kl_rows), indices.ce_is_dummy, indices.kl_is_dummy) == (3, False, False)


@pytest.mark.parametrize("num_narrow", range(1, 13))
def test_short_last_step_is_dealt_out_evenly(num_narrow):
    ranks = [list(sampler(num_narrow, 2, 6, 3, 2, rank)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == -(-num_narrow // 4)
    chunks = [chunk for step in zip(*ranks, strict=True) for chunk in step]
    sizes = [0 if chunk.ce_is_dummy else len(chunk.ce_rows) for chunk in chunks]
    kl_sizes = [0 if chunk.kl_is_dummy else len(chunk.kl_rows) for chunk in chunks]
    assert sum(sizes) == num_narrow
    assert sum(kl_sizes) == 3 * num_narrow
    assert max(sizes) - min(sizes) <= 1
    assert max(kl_sizes) - min(kl_sizes) <= 1
    assert max(sizes) <= 2
    assert max(kl_sizes) <= 6


def test_rank_without_rows_gets_a_dummy():
    one, other = (list(sampler(1, 1, 1, 1, 2, rank)) for rank in range(2))
    assert sorted([one[0].ce_is_dummy, other[0].ce_is_dummy]) == [False, True]
    assert sorted([one[0].kl_is_dummy, other[0].kl_is_dummy]) == [False, True]
    assert one[0].ce_rows == other[0].ce_rows == (0,)
    assert one[0].kl_rows == other[0].kl_rows
    assert one[0].step_counts == other[0].step_counts


def test_narrow_order_is_the_same_without_a_kl_stream():
    for epoch in range(2):
        with_kl = [ce for ce, _, _ in steps_of(epoch)]
        without = steps_of(epoch, kl=False)
        assert [ce for ce, _, _ in without] == with_kl
        assert all(not kl and counts.kl_all == counts.kl_response == 0 for _, kl, counts in without)


def test_order_changes_with_epoch_and_seed_and_nothing_else():
    def order(epoch=0, **settings):
        return [row for ce, _, _ in steps_of(epoch, **settings) for row in ce]

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (4, 1), (2, 2)])
def test_resumed_epoch_is_the_rest_and_the_length_stays(accumulate, world_size):
    for rank in range(world_size):
        whole = sampler(accumulate=accumulate, world_size=world_size, rank=rank)
        whole.set_epoch(1)
        expected = list(whole)
        assert len(whole) == len(expected)
        for consumed in range(len(expected) + 1):
            resumed = sampler(accumulate=accumulate, world_size=world_size, rank=rank)
            resumed.start_at(1, consumed)
            assert list(resumed) == expected[consumed:]
            assert list(resumed) == expected[consumed:]
            assert len(resumed) == len(expected)
            resumed.set_epoch(1)
            assert list(resumed) == expected[consumed:]


def test_epochs_after_the_resumed_one_are_whole():
    resumed, plain = sampler(), sampler()
    resumed.start_at(1, 5)
    for epoch in (0, 2):
        resumed.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert list(resumed) == list(plain)


def test_epochs_that_lightning_cut_are_taken_back():
    resumed, plain = sampler(), sampler()
    resumed.start_at(1, 5, cut_epochs=1)
    plain.set_epoch(1)
    resumed.set_epoch(2)
    assert list(resumed) == list(plain)[5:]
    plain.set_epoch(2)
    resumed.set_epoch(3)
    assert list(resumed) == list(plain)


def test_number_of_steps_is_the_number_of_optimizer_steps():
    for accumulate in (1, 3):
        one = sampler(accumulate=accumulate)
        assert one.num_steps == len(steps_of(accumulate=accumulate))


def test_rows_mix_over_epochs():
    first = Counter(steps_of(epoch, num_narrow=4, batch_size=1)[0][0][0] for epoch in range(200))
    assert min(first.values()) > 25  # each of four rows comes first about 50 times


def test_impossible_geometry_is_an_error():
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches must be at least 1, got 0"):
        BatchGeometry(1, 1, accumulate=0)
    with pytest.raises(ValueError, match="no narrow rows"):
        sampler(num_narrow=0)
    with pytest.raises(ValueError, match=r"rank must lie in 0\.\.1, got 2"):
        sampler(world_size=2, rank=2)
    with pytest.raises(ValueError, match="cannot skip 13 micro-batches of an epoch that has 12"):
        sampler().start_at(0, 13)


BUDGET = {"max_tokens": 300, "batch_size": 2, "kl_batch_size": 3}


def tokens(indices) -> int:
    narrow = 0 if indices.ce_is_dummy else sum(NARROW_ALL[row] for row in indices.ce_rows)
    return narrow + (0 if indices.kl_is_dummy else sum(KL_ALL[row] for row in indices.kl_rows))


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("max_tokens", [170, 300, 1000, 10**6])
def test_a_token_budget_is_kept_and_every_narrow_row_comes_once(max_tokens, accumulate, world_size):
    settings = BUDGET | {"max_tokens": max_tokens, "num_narrow": 100}
    for epoch in range(3):
        found = steps_of(epoch, accumulate, world_size, **settings)
        assert sorted(row for ce, _, _ in found for row in ce) == list(range(100))
        assert all(ce and kl for ce, kl, _ in found)
        for ce, kl, counts in found:
            assert counts.ce == sum(5 + row % 4 for row in ce)
            assert counts.kl_response == sum(KL_RESPONSE[row] for row in kl)
            assert counts.kl_all == sum(KL_ALL[row] for row in kl)
        for rank in range(world_size):
            one = sampler(accumulate=accumulate, world_size=world_size, rank=rank, **settings)
            one.set_epoch(epoch)
            sizes = [tokens(indices) for indices in one]
            assert len(sizes) == len(one) == len(found) * accumulate
            assert max(sizes) <= max_tokens


def test_a_token_budget_is_used() -> None:
    sizes = [tokens(indices) for indices in sampler(num_narrow=100, **BUDGET | {"max_tokens": 1000})]
    longest = max(NARROW_ALL) + max(KL_ALL)
    assert sum(sizes) / len(sizes) > 1000 - longest - sum(sizes) / len(sizes) ** 2
    assert len(sizes) == -(-sum(sizes) // (1000 - longest))


def test_a_token_budget_takes_kl_rows_in_proportion_round_the_stream() -> None:
    settings = BUDGET | {"num_narrow": 100}
    rows = [row for epoch in range(22) for _, kl, _ in steps_of(epoch, **settings) for row in kl]
    cycles = [rows[first : first + NUM_KL] for first in range(0, len(rows) - NUM_KL, NUM_KL)]
    assert all(sorted(cycle) == list(range(NUM_KL)) for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == len(cycles)
    assert abs(len(rows) - 22 * 150) <= 22


@pytest.mark.parametrize("settings", [BUDGET, {"length_buckets": 3}], ids=str)
def test_ranks_and_accumulation_see_the_same_steps(settings):
    for epoch in range(2):
        wanted = steps_of(epoch, 6, 1, num_narrow=40, **settings)
        assert wanted == steps_of(epoch, 1, 6, num_narrow=40, **settings)
        assert wanted == steps_of(epoch, 2, 3, num_narrow=40, **settings)


@pytest.mark.parametrize("settings", [{}, BUDGET, {"length_buckets": 3}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_goes_on_with_the_same_steps_on_other_ranks(settings, ranks):
    before, now = {"accumulate": 6, "world_size": 1}, {"accumulate": 6 // ranks, "world_size": ranks}
    geometry = BatchGeometry(2, 3, **now, max_tokens=settings.get("max_tokens"))
    assert same_steps(before, geometry) == (ranks > 1)
    assert not same_steps(before | {"world_size": 2}, geometry)
    wanted = steps_of(1, num_narrow=40, **settings | before)
    regear = Regearing(6, now["accumulate"], len(sampler(40, **settings | now)))
    for steps in range(len(wanted)):
        goes_on = [sampler(40, rank=rank, **settings | now) for rank in range(ranks)]
        for one in goes_on:
            one.start_at(1, regear(6 * steps))
        counts = [step.step_counts for step in goes_on[0]]
        assert counts[:: now["accumulate"]] == [counts_of for _, _, counts_of in wanted[steps:]]
        (first, *_) = zip(*goes_on, strict=True)
        assert {row for chunk in first for row in chunk.ce_rows} <= set(wanted[steps][0])


@pytest.mark.parametrize("settings", [BUDGET, {"length_buckets": 3}], ids=str)
def test_any_order_is_that_of_seed_and_epoch_and_does_not_need_a_kl_stream(settings):
    def order(epoch=0, **more):
        return [row for ce, _, _ in steps_of(epoch, **settings | more) for row in ce]

    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    assert order() == order(kl=False)


@pytest.mark.parametrize("settings", [BUDGET, {"length_buckets": 3}], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_any_order_is_resumed_from_every_place(settings, rank):
    settings = settings | {"num_narrow": 60, "accumulate": 2, "world_size": 2, "rank": rank}
    whole = sampler(**settings)
    whole.set_epoch(1)
    expected = list(whole)
    assert len(expected) > 5
    for consumed in range(len(expected) + 1):
        resumed = sampler(**settings)
        resumed.start_at(1, consumed)
        assert list(resumed) == expected[consumed:]
        assert len(resumed) == len(expected)


def test_buckets_bring_rows_of_similar_length_together():
    def padding(buckets):
        found = sampler(num_narrow=100, batch_size=4, length_buckets=buckets)
        batches = [[NARROW_ALL[row] for row in one.ce_rows] for one in found]
        return sum(max(batch) * len(batch) for batch in batches) / sum(map(sum, batches))

    assert padding(8) < 1.08 < 1.25 < padding(None)


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_buckets_leave_no_row_out(accumulate, world_size):
    for epoch in range(3):
        found = steps_of(epoch, accumulate, world_size, num_narrow=50, length_buckets=4)
        assert sorted(row for ce, _, _ in found for row in ce) == list(range(50))


def test_one_bucket_is_no_bucket() -> None:
    assert steps_of(1) == steps_of(1, length_buckets=1)


def test_impossible_budgets_are_refused() -> None:
    longest = max(NARROW_ALL[:23]) + max(KL_ALL)
    with pytest.raises(ValueError, match=rf"more than the longest rows .* {longest} tokens, got {longest}"):
        sampler(max_tokens=longest)
    with pytest.raises(ValueError, match="may get no row of the narrow stream; raise it"):
        sampler(max_tokens=longest + 2)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        sampler(max_tokens=0)
    with pytest.raises(ValueError, match=r"leave it or data\.max_tokens out"):
        sampler(max_tokens=1000, length_buckets=2)
