import errno
import functools
import logging
import multiprocessing
import os
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.batch import concat, single_rows
from lightning_em.models import AdaptedModel
from lightning_em.models.fast import FastOptions
from lightning_em.models.fast.store import ActivationStore, StoreOptions
from tests.models.architectures import build, rows

CE, KL = rows((11, 7, 9), seed=1), rows((8, 12), seed=2)
ADAPTERS = {
    "vector": lambda: SteeringVector(1, alpha=1.0),
    "lora": lambda: LoRA(2, 4.0, ["q_proj", "down_proj"], layers=[2]),
    "lora_everywhere": lambda: LoRA(2, 4.0, ["q_proj"]),
}
OPTIONS = [
    *(FastOptions(*flags) for flags in product((True, False), repeat=3)),
    FastOptions(immediate=False),
    FastOptions(part_tokens=8),
]


def stored(folder=None, **limits):
    return ActivationStore(StoreOptions(None if folder is None else str(folder), **limits))


def made(adapter="vector", dtype=torch.float32, name="qwen2", **options):
    model = AdaptedModel(build(name, dtype=dtype), ADAPTERS[adapter](), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if dtype == torch.float64:
                parameter.data = parameter.data.double()
    return model


def measured(model, ce=CE, kl=KL, kl_positions="response"):
    sums = model.losses(ce, kl, kl_positions)
    gradients = torch.autograd.grad(sums.ce.total + sums.kl.total, list(model.adapter.trainable().values()))
    values = torch.stack([sums.ce.total.detach(), sums.kl.total.detach()])
    return torch.cat([values, *(gradient.flatten() for gradient in gradients)])


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hit_equals_miss_to_the_bit_in_ram_and_from_disk(tmp_path, adapter, reference):
    model = made(adapter, store=stored(tmp_path), reference=reference)
    miss = measured(model)
    assert torch.equal(measured(model), miss)
    from_disk = made(adapter, store=stored(tmp_path, ram_gib=0), reference=reference)
    assert torch.equal(measured(from_disk), miss)
    assert torch.equal(measured(from_disk), miss)
    assert torch.equal(measured(made(adapter, store=stored(ram_gib=0), reference=reference)), miss)


def test_nothing_below_the_cut_runs_on_a_hit():
    model = made(store=stored(), reference="cached")
    runs = []
    for index, block in enumerate(model.base.model.layers):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    measured(model)
    runs.clear()
    measured(model)
    assert runs == [2, 3, 2, 3]  # the tuned model on both streams; the reference not at all


def test_one_step_runs_the_lower_layers_once_and_on_a_hit_not_at_all():
    for store, runs_of_layer_0 in ((None, [1, 1]), (stored(), [5, 0])):  # a store is filled row by row
        model = made(store=store)
        model.row_ce(rows((4,), seed=8))  # packing and adapter are checked on the first use
        runs = []
        model.base.model.layers[0].register_forward_hook(lambda *_, runs=runs: runs.append(0))
        for expected in runs_of_layer_0:
            runs.clear()
            assert model.losses(CE, KL).kl.count > 0
            assert len(runs) == expected


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_numbers_do_not_depend_on_what_the_store_holds(adapter, reference):
    row = single_rows(CE)
    first, second = concat([row[0], row[1]]), concat([row[2], row[0]])
    uninterrupted = made(adapter, store=stored(), reference=reference)
    measured(uninterrupted, first)
    resumed = made(adapter, store=stored(), reference=reference)
    assert torch.equal(measured(uninterrupted, second), measured(resumed, second))


@functools.cache
def full_logits(adapter, dtype=torch.float64, kl_positions="response"):
    """What `measured` finds on the plain path, computed once for all tests that compare with it."""
    return measured(made(adapter, dtype, backend="plain"), kl_positions=kl_positions)


@pytest.mark.parametrize("reference", ["live", "cached"])
# Which positions count is a mask, the same for every adapter: one of them meets both kinds.
@pytest.mark.parametrize(
    ("adapter", "kl_positions"), [*((adapter, "response") for adapter in ADAPTERS), ("lora", "all")]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_combination_equals_full_logits_in_float64(options, adapter, reference, kl_positions):
    exact = full_logits(adapter, kl_positions=kl_positions)
    model = made(adapter, torch.float64, backend=options, store=stored(), reference=reference)
    for _ in range(2):
        got = measured(model, kl_positions=kl_positions)
        assert (got[:2] - exact[:2]).abs().max() <= 1e-10 * exact[:2].abs().max()
        assert (got[2:] - exact[2:]).norm() <= 1e-10 * exact[2:].norm()


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_float32_error_is_at_most_twice_the_naive_one(adapter, reference):
    exact, naive = full_logits(adapter), full_logits(adapter, torch.float32)
    model = made(adapter, store=stored(), reference=reference)
    for _ in range(2):
        got = measured(model)
        for part in (slice(2), slice(2, None)):
            floor = 1e-7 * exact[part].norm()  # one rounding: naive may hit the exact value by luck
            assert (got[part] - exact[part]).norm() <= 2 * (naive[part] - exact[part]).norm() + floor


def test_a_cached_reference_has_a_small_floor_and_a_live_one_none():
    live = AdaptedModel(build("qwen2"), SteeringVector(1), store=stored())
    cached = AdaptedModel(build("qwen2"), SteeringVector(1), store=stored(), reference="cached")
    for _ in range(2):
        assert live.losses(CE, KL).kl.total == 0
        assert 0 <= cached.losses(CE, KL).kl.total < 1e-8


def test_positions_that_count_are_part_of_the_reference_key():
    model = made(store=stored(), reference="cached")
    counts = [model.losses(CE, KL, kind).kl for kind in ("response", "all", "response")]
    assert counts[0].total == counts[2].total
    assert counts[1].count == 20


def test_validation_fills_what_training_differentiates_through():
    model = made("lora", store=stored(), reference="cached")
    with torch.inference_mode():
        model.row_ce(CE)
        model.row_kl(KL)
    assert measured(model).isfinite().all()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_found_and_filled_again(tmp_path, damage, caplog):
    expected = measured(made(store=stored(tmp_path)))
    files = sorted(tmp_path.glob("*/??/*"))
    assert len(files) == 5
    content = bytearray(files[0].read_bytes())
    if damage == "flip":
        content[-5] ^= 4
    files[0].write_bytes({"flip": content, "truncate": content[:-40], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        assert torch.equal(measured(made(store=stored(tmp_path))), expected)
    assert [str(files[0]) in message and "is damaged" in message for message in caplog.messages] == [True]
    load_file(files[0])
    caplog.clear()
    assert torch.equal(measured(made(store=stored(tmp_path))), expected)
    assert caplog.messages == []


@pytest.mark.parametrize("way", ["written to", "replaced"])
def test_damage_after_the_first_read_is_found_too(tmp_path, way, caplog):
    model = made(store=stored(tmp_path, ram_gib=0))
    expected = measured(model)
    assert torch.equal(measured(model), expected)  # every file is read and known to be whole
    (file, *_) = sorted(tmp_path.glob("*/??/*"))
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-5] ^= 0x40
    if way == "written to":
        file.write_bytes(content)
    else:  # by a file of the same size and time
        other = tmp_path / "other"
        other.write_bytes(content)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(file)
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        assert torch.equal(measured(model), expected)
    assert [str(file) in message and "is damaged" in message for message in caplog.messages] == [True]
    assert torch.equal(measured(model), expected)


def test_a_file_that_cannot_be_opened_is_left_alone(tmp_path, monkeypatch):
    expected = measured(made(store=stored(tmp_path)))
    files = sorted(tmp_path.glob("*/??/*"))

    def no_more_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("lightning_em.models.fast.store.safe_open", no_more_files)
    assert torch.equal(measured(made(store=stored(tmp_path))), expected)
    assert sorted(tmp_path.glob("*/??/*")) == files


def test_the_disk_limit_holds_and_changes_no_number(tmp_path, caplog):
    expected = measured(made(store=stored()))
    limit = 3000
    store = stored(tmp_path, ram_gib=0, disk_gib=limit / 2**30)
    model = made(store=store)
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        for _ in range(2):
            assert torch.equal(measured(model), expected)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/??/*")]
    assert 0 < sum(sizes) <= limit + max(sizes)
    assert 0 < len(sizes) < 5
    assert sum("disk is full" in message for message in caplog.messages) == 1
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert f"nothing more is written to {tmp_path}" in warning
    assert "all of it belongs to this model and these settings" in warning


def test_a_full_folder_says_what_other_models_hold_of_it(tmp_path, caplog):
    measured(made(store=stored(tmp_path)))
    (others,) = tmp_path.iterdir()
    full = sum(path.stat().st_size for path in tmp_path.glob("*/??/*"))
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        for _ in range(2):
            measured(made(name="qwen3", store=stored(tmp_path, disk_gib=(full + 3000) / 2**30, ram_gib=0)))
    assert len(list(tmp_path.iterdir())) == 2
    assert len(caplog.messages) == 2  # one a store
    for message in caplog.messages:
        assert f"written to {tmp_path}" in message
        assert message.endswith(f"if no other run needs it: {others.name}.")
    shutil.rmtree(others)
    caplog.clear()
    measured(made(name="qwen3", store=stored(tmp_path, disk_gib=(full + 3000) / 2**30, ram_gib=0)))
    assert caplog.messages == []


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    expected = measured(made(store=stored()))
    model = made(store=stored(tmp_path / "file" / "states", ram_gib=0))
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        assert torch.equal(measured(model), expected)
    assert [
        message.startswith("activation store: nothing more is written") for message in caplog.messages
    ] == [True]


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    measured(made(store=stored(tmp_path)))
    folder = next(tmp_path.glob("*/??"))
    old, fresh, not_ours = (folder / name for name in (f".{'a' * 40}.node.1", f".{'b' * 40}.node.2", ".env"))
    for left in (old, fresh, not_ours):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(not_ours, (0, 0))
    measured(made(store=stored(tmp_path)), rows((6, 5), seed=9))
    assert (old.exists(), fresh.exists(), not_ours.exists()) == (False, True, True)


def test_the_ram_limit_holds():
    store = stored(ram_gib=2500 / 2**30)
    measured(made(store=store))
    held = sum(tensor.nbytes for tensor in store._tensors["ram"].values())
    assert 0 < held == store.used["ram"] <= 2500


def test_another_process_counts_towards_the_limit(tmp_path):
    measured(made(store=stored(tmp_path)))
    full = sum(path.stat().st_size for path in tmp_path.glob("*/??/*"))
    late = stored(tmp_path, disk_gib=full / 2**30, ram_gib=0)
    measured(made(store=late), rows((6, 5), seed=9))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/??/*")) == full


def fill(folder, barrier, results):
    torch.set_num_threads(1)
    model = made(store=stored(folder), reference="cached")
    barrier.wait()
    results.put(measured(model).tolist())


def test_two_ranks_fill_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=fill, args=(tmp_path, barrier, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    values = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert values[0] == values[1]
    files = list(tmp_path.glob("*/??/*"))
    assert len(files) == 7  # five prefixes, two references, nothing unfinished
    assert all(path.suffix == ".safetensors" for path in files)


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_states_made_under_autocast_are_not_used_without(tmp_path, reference):
    expected = measured(made(store=stored(), reference=reference))
    model = made(store=stored(tmp_path), reference=reference)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = measured(model)
        assert torch.equal(measured(model), expected)
        assert (narrow - expected).norm() > 1e-4 * expected.norm()
    assert torch.equal(measured(made(store=stored(tmp_path, ram_gib=0), reference=reference)), expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_base_with_two_embeddings_swapped_does_not_find_the_others_states(tmp_path):
    batch = rows((11, 7), seed=1)
    first, second = batch.input_ids[:2].tolist()

    def swapped(**options):
        base = build("qwen2")
        with torch.no_grad():
            weight = base.model.embed_tokens.weight
            weight[[first, second]] = weight[[second, first]].clone()
        return AdaptedModel(base, SteeringVector(1), **options)

    AdaptedModel(build("qwen2"), SteeringVector(1), store=stored(tmp_path)).row_ce(batch)
    found = swapped(store=stored(tmp_path)).row_ce(batch)
    assert torch.equal(found.sums, swapped(store=stored()).row_ce(batch).sums)


def test_adapters_at_one_layer_share_their_states(tmp_path):
    measured(made("vector", store=stored(tmp_path), reference="cached"))  # enters layer 2
    files = set(tmp_path.glob("*/??/*"))
    measured(made("lora", store=stored(tmp_path), reference="cached"))  # sits in layer 2
    assert set(tmp_path.glob("*/??/*")) == files


def test_the_size_is_said_before_it_is_filled(caplog):
    model = made(store=stored(ram_gib=1.0), reference="cached")
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        assert model.announce_store(2**20, 2**19) == (2**20 + 2**19) * 32 * 4
    assert "hidden states of 1572864 tokens will take 0.19 GiB" in caplog.text
    assert model.backend.hidden.cache.store.used["ram"] == 0
    assert "computed each time" not in caplog.text
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        model.backend.hidden.cache.store.announce(2**40, "everything")
    assert "everything will take 1024.00 GiB; the largest tier holds 1.00 GiB: the rest is" in caplog.text


def test_a_cached_reference_needs_a_store():
    with pytest.raises(ValueError, match="there is no store"):
        made(reference="cached")


def test_limits_are_not_negative():
    for limit in (-1, float("inf")):
        with pytest.raises(ValueError, match=r"limits must be finite and at least 0.*model\.store"):
            StoreOptions(ram_gib=limit)


@pytest.mark.parametrize("folder", ["", "  "])
def test_a_folder_without_a_name_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"must name a folder, got '.*model\.store\.folder, or null for none"
    ):
        StoreOptions(folder)


def test_a_sweep_uses_the_store():
    model = made(store=stored(), reference="cached")
    points = [functools.partial(model.adapter.at_scale, scale) for scale in (0.0, 1.0)]
    first = model.sweep_row_kl([CE, KL], points)
    second = model.sweep_row_kl([CE, KL], points)
    assert all(torch.equal(one.sums, two.sums) for one, two in zip(first, second, strict=True))


def test_a_full_store_does_not_hide_an_adapter_that_lies_too_low(tmp_path):
    measured(made(store=stored(tmp_path)))
    liar = made(store=stored(tmp_path))
    liar.base.model.layers[0].register_forward_hook(
        lambda _, __, out: out + liar.adapter.scale * liar.adapter.vector
    )
    with pytest.raises(ValueError, match="changes the model below layer 2"):
        measured(liar)


def test_nothing_to_store_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        model = made("lora_everywhere", store=stored())
    assert caplog.messages == [
        "nothing is kept in the activation store, the reference runs live: no layer lies below the adapter"
    ]
    assert model.announce_store(100) == 0
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        made(backend="plain", store=stored())
    assert "the plain backend does not use the activation store" in caplog.text


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_where_each_pass_holds_one_row_a_store_changes_no_bit(adapter):
    def losses(**options):
        model = made(adapter, **options)
        total = model.losses(rows((11,), seed=1), None).ce.total
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(total, list(model.adapter.trainable().values()))]
        )

    assert torch.equal(losses(store=stored()), losses())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_elsewhere_a_store_changes_the_last_digits(adapter):
    without, with_store = measured(made(adapter)), measured(made(adapter, store=stored()))
    assert (with_store - without).norm() <= 1e-5 * without.norm()
    if adapter == "lora_everywhere":
        assert torch.equal(with_store, without)
