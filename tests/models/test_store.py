import logging
import multiprocessing
from functools import partial
from itertools import product

import pytest
import torch
from safetensors.torch import load_file

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.models import AdaptedModel
from lightning_em.models.engine import EngineOptions, joined, single_rows
from lightning_em.models.store import ActivationStore, fingerprint, row_key, why_not_stored
from tests.models.architectures import build, rows

CE, KL = rows((11, 7, 9), seed=1), rows((8, 12), seed=2)
ADAPTERS = {
    "vector": lambda: SteeringVector(1, alpha=1.0),
    "lora": lambda: LoRA(2, 4.0, ["q_proj", "down_proj"], layers=[2]),
    "lora_everywhere": lambda: LoRA(2, 4.0, ["q_proj"]),
}


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
    model = made(adapter, store=ActivationStore(tmp_path), reference=reference)
    miss = measured(model)
    assert torch.equal(measured(model), miss)
    from_disk = made(adapter, store=ActivationStore(tmp_path, ram_gib=0), reference=reference)
    assert torch.equal(measured(from_disk), miss)
    assert torch.equal(measured(from_disk), miss)
    assert torch.equal(measured(made(adapter, store=ActivationStore(ram_gib=0), reference=reference)), miss)


def test_nothing_below_the_cut_runs_on_a_hit():
    model = made(store=ActivationStore(), reference="cached")
    runs = []
    for index, block in enumerate(model.base.model.layers):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    measured(model)
    runs.clear()
    measured(model)
    assert runs == [2, 3, 2, 3]  # the tuned model on both streams; the reference not at all


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_numbers_do_not_depend_on_what_the_store_holds(adapter, reference):
    row = single_rows(CE)
    first, second = joined([row[0], row[1]]), joined([row[2], row[0]])
    uninterrupted = made(adapter, store=ActivationStore(), reference=reference)
    measured(uninterrupted, first)
    resumed = made(adapter, store=ActivationStore(), reference=reference)
    assert torch.equal(measured(uninterrupted, second), measured(resumed, second))


@pytest.mark.parametrize("kl_positions", ["response", "all"])
@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("flags", list(product((True, False), repeat=3)), ids=str)
def test_every_combination_equals_full_logits_in_float64(flags, adapter, reference, kl_positions):
    exact = measured(made(adapter, torch.float64, engine="plain"), kl_positions=kl_positions)
    options = EngineOptions(*flags)
    model = made(adapter, torch.float64, engine=options, store=ActivationStore(), reference=reference)
    for _ in range(2):
        got = measured(model, kl_positions=kl_positions)
        assert (got[:2] - exact[:2]).abs().max() <= 1e-10 * exact[:2].abs().max()
        assert (got[2:] - exact[2:]).norm() <= 1e-10 * exact[2:].norm()


def test_a_cached_reference_has_a_small_floor_and_a_live_one_none():
    live = AdaptedModel(build("qwen2"), SteeringVector(1), store=ActivationStore())
    cached = AdaptedModel(build("qwen2"), SteeringVector(1), store=ActivationStore(), reference="cached")
    for _ in range(2):
        assert live.losses(CE, KL).kl.total == 0
        assert 0 <= cached.losses(CE, KL).kl.total < 1e-8


def test_positions_that_count_are_part_of_the_reference_key():
    model = made(store=ActivationStore(), reference="cached")
    counts = [model.losses(CE, KL, kind).kl for kind in ("response", "all", "response")]
    assert counts[0].total == counts[2].total
    assert counts[1].count == 20


def test_validation_fills_what_training_differentiates_through():
    model = made("lora", store=ActivationStore(), reference="cached")
    with torch.inference_mode():
        model.row_ce(CE)
        model.row_kl(KL)
    assert measured(model).isfinite().all()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_found_and_filled_again(tmp_path, damage, caplog):
    expected = measured(made(store=ActivationStore(tmp_path)))
    files = sorted(tmp_path.glob("??/*"))
    assert len(files) == 5
    content = bytearray(files[0].read_bytes())
    if damage == "flip":
        content[-5] ^= 4
    files[0].write_bytes({"flip": content, "truncate": content[:-40], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        assert torch.equal(measured(made(store=ActivationStore(tmp_path))), expected)
    assert [str(files[0]) in message and "is damaged" in message for message in caplog.messages] == [True]
    load_file(files[0])
    caplog.clear()
    assert torch.equal(measured(made(store=ActivationStore(tmp_path))), expected)
    assert caplog.messages == []


def test_the_disk_limit_holds_and_changes_no_number(tmp_path, caplog):
    expected = measured(made(store=ActivationStore()))
    limit = 3000
    store = ActivationStore(tmp_path, ram_gib=0, disk_gib=limit / 2**30)
    model = made(store=store)
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        for _ in range(2):
            assert torch.equal(measured(model), expected)
    sizes = [path.stat().st_size for path in tmp_path.glob("??/*")]
    assert 0 < sum(sizes) <= limit + max(sizes)
    assert 0 < len(sizes) < 5
    assert sum("disk is full" in message for message in caplog.messages) == 1


def test_the_ram_limit_holds():
    store = ActivationStore(ram_gib=2500 / 2**30)
    measured(made(store=store))
    held = sum(tensor.nbytes for tensor in store._tensors["ram"].values())
    assert 0 < held == store.used["ram"] <= 2500


def test_another_process_counts_towards_the_limit(tmp_path):
    measured(made(store=ActivationStore(tmp_path)))
    full = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
    late = ActivationStore(tmp_path, disk_gib=full / 2**30, ram_gib=0)
    measured(made(store=late), rows((6, 5), seed=9))
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) == full


def fill(folder, barrier, results):
    torch.set_num_threads(1)
    model = made(store=ActivationStore(folder), reference="cached")
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
    files = list(tmp_path.glob("??/*"))
    assert len(files) == 7  # five prefixes, two references, nothing unfinished
    assert all(path.suffix == ".safetensors" for path in files)


def name_of(model, layout="packed"):
    return fingerprint(model.base, model.adapter.trainable().values(), layout)


def test_the_key_knows_what_changes_the_states():
    model = made()
    first = name_of(model)
    assert name_of(made()) == first
    assert name_of(model, "padded") != first
    assert name_of(made(dtype=torch.bfloat16)) != first
    assert name_of(made(name="qwen3")) != first
    with torch.no_grad():
        model.base.model.layers[0].mlp.up_proj.weight[3, 5] *= 1.001
    assert name_of(model) != first
    ids = torch.tensor([1, 2, 3])
    keys = {
        row_key(space, row, mask) for space in "ab" for row in (ids, ids.flip(0)) for mask in (None, ids > 1)
    }
    assert len(keys) == 8


def test_adapters_on_one_base_share_their_keys():
    lora = made("lora")
    assert name_of(lora) == name_of(made("vector"))
    with torch.no_grad():
        for parameter in lora.adapter.trainable().values():
            parameter.add_(1)
    assert name_of(lora) == name_of(made("lora_everywhere"))


def test_adapters_at_one_layer_share_their_states(tmp_path):
    measured(made("vector", store=ActivationStore(tmp_path), reference="cached"))  # enters layer 2
    files = set(tmp_path.glob("??/*"))
    measured(made("lora", store=ActivationStore(tmp_path), reference="cached"))  # sits in layer 2
    assert set(tmp_path.glob("??/*")) == files


def test_length_dependent_rotary_embeddings_are_refused(caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = build("llama", rope_parameters=rope)
    assert "dynamic" in why_not_stored(base)
    store = ActivationStore()
    with caplog.at_level(logging.WARNING, logger="lightning_em"):
        model = AdaptedModel(base, SteeringVector(1), store=store)
    assert "rotary embedding (dynamic) depends on the longest row" in caplog.text
    model.losses(CE, KL)
    assert store.used["ram"] == 0


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "phi3", "granite"])
def test_ordinary_rotary_embeddings_are_stored(name):
    assert why_not_stored(build(name)) is None


def test_the_size_is_said_before_it_is_filled(caplog):
    model = made(store=ActivationStore(ram_gib=1.0), reference="cached")
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        assert model.announce_store(2**20, 2**19) == (2**20 + 2**19) * 32 * 4
    assert "hidden states of 1572864 tokens will take 0.19 GiB" in caplog.text
    assert model._engine.store.used["ram"] == 0
    assert not model._engine.store.announce(2**40, "everything")


def test_a_cached_reference_needs_a_store():
    with pytest.raises(ValueError, match="there is no store"):
        made(reference="cached")


def test_limits_are_not_negative():
    with pytest.raises(ValueError, match="limits must be at least 0"):
        ActivationStore(ram_gib=-1)


def test_a_sweep_uses_the_store():
    model = made(store=ActivationStore(), reference="cached")
    points = [partial(model.adapter.at_scale, scale) for scale in (0.0, 1.0)]
    first = model.sweep_row_kl([CE, KL], points)
    second = model.sweep_row_kl([CE, KL], points)
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a.sums, b.sums) for a, b in zip(one, two, strict=True))
