import functools
import itertools
import logging
from functools import partial

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LoRA, SteeringVector
from lightning_em.batch import concat
from lightning_em.models import ActivationStore, AdaptedModel, StoreOptions
from lightning_em.models.fast import FastOptions
from lightning_em.models.fast.row_cache import _fill_groups
from tests.models.architectures import LAYERS, QUIRKS, build, rows

CE, KL = rows((11, 7, 9), seed=1), rows((8, 12), seed=2)
OPTIONS = [
    *(FastOptions(*flags) for flags in itertools.product((True, False), repeat=4)),
    FastOptions(part_tokens=8),
    FastOptions(part_tokens=19, packed=False),
]
LINEAR = {"phi3": ["qkv_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense_4h_to_h"]}
ADAPTERS = {
    "vector": lambda _: SteeringVector(1, alpha=1.0),
    "vector_at_the_end": lambda _: SteeringVector(LAYERS - 1, alpha=1.0),
    "lora": lambda name: LoRA(2, 4.0, LINEAR.get(name, ["q_proj", "down_proj"]), layers=[2]),
    "lora_everywhere": lambda name: LoRA(2, 4.0, LINEAR.get(name, ["q_proj", "down_proj"])),
}


def made(name="qwen2", adapter="vector", backend="auto", dtype=torch.float32, size=0.3, base=None, **options):
    base = build(name, dtype=dtype) if base is None else base
    return moved(AdaptedModel(base, ADAPTERS[adapter](name), backend=backend, **options), size)


def moved(model, size=0.3):
    """The model with random values added to its adapter, which is float64 if the base is."""
    dtype = model.base.dtype
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
            if dtype == torch.float64:
                parameter.data = parameter.data.double()  # the oracle: no rounding in the adapter either
    return model


def measured(model, kl_positions="response", kl_weight=3.7):
    """Loss terms, and the gradient of their weighted sum as one vector."""
    sums = model.losses(CE, KL, kl_positions)
    total = sums.ce.total + kl_weight * sums.kl.total
    gradients = torch.autograd.grad(total, list(model.adapter.trainable().values()))
    values = torch.stack([sums.ce.total.detach(), sums.kl.total.detach()]).double()
    return values, torch.cat([gradient.flatten().double() for gradient in gradients]), sums


@functools.cache
def full_logits(name="qwen2", adapter="vector", kl_positions="response", dtype=torch.float64):
    """What `measured` finds on the plain path, computed once for all tests that compare with it."""
    return measured(made(name, adapter, "plain", dtype), kl_positions)


# Which positions count is a mask, the same for every adapter: one of them meets both kinds.
POSITIONS = [*((adapter, "response") for adapter in ADAPTERS), ("lora", "all")]


@pytest.mark.parametrize(("adapter", "kl_positions"), POSITIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_combination_equals_full_logits_in_float64(options, adapter, kl_positions):
    expected, expected_gradient, plain = full_logits("qwen2", adapter, kl_positions)
    values, gradient, sums = measured(
        made(adapter=adapter, backend=options, dtype=torch.float64), kl_positions
    )
    assert (values - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (gradient - expected_gradient).norm() <= 1e-10 * expected_gradient.norm()
    assert (sums.ce.count, sums.kl.count) == (plain.ce.count, plain.kl.count)


WAYS = {
    "auto": {},
    "padded": {"backend": FastOptions(packed=False)},
    "logits": {"backend": FastOptions(fused=False)},
    "store": {"store": StoreOptions()},
    "store, reference": {"store": StoreOptions(), "reference": "cached"},
}


@pytest.mark.parametrize("adapter", ["vector", "lora", "lora_everywhere"])
@pytest.mark.parametrize("name", QUIRKS)
def test_every_architecture_equals_full_logits_in_float64(name, adapter):
    expected, expected_gradient, _ = full_logits(name, adapter)
    for way, options in WAYS.items():
        store = {"store": ActivationStore(options["store"])} if "store" in options else {}
        model = made(name, adapter, **{"backend": "auto", "dtype": torch.float64} | options | store)
        for _ in range(1 + len(store)):  # the second finds the store filled
            values, gradient, _ = measured(model)
            assert (values - expected).abs().max() <= 1e-10 * expected.abs().max(), way
            assert (gradient - expected_gradient).norm() <= 1e-10 * expected_gradient.norm(), way


@pytest.mark.parametrize("adapter", ["vector", "lora_everywhere"])
@pytest.mark.parametrize("name", QUIRKS)
def test_float32_error_of_every_architecture_is_at_most_twice_the_naive_one(name, adapter):
    assert_error_is_small(name, adapter, "auto")


def assert_error_is_small(name, adapter, backend):
    exact, exact_gradient, _ = full_logits(name, adapter)
    naive, naive_gradient, _ = full_logits(name, adapter, dtype=torch.float32)
    values, gradient, _ = measured(made(name, adapter, backend))
    floor = 1e-7  # one rounding: naive may hit the exact value by luck
    assert (values - exact).norm() <= 2 * (naive - exact).norm() + floor * exact.norm()
    assert (gradient - exact_gradient).norm() <= 2 * (
        naive_gradient - exact_gradient
    ).norm() + floor * exact_gradient.norm()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_error_is_at_most_twice_the_naive_one(options, adapter):
    assert_error_is_small("qwen2", adapter, options)


@pytest.mark.parametrize("options", [*OPTIONS, "auto", "plain"], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_adapter_means_kl_exactly_zero(adapter, options):
    model = made(adapter=adapter, backend=options, size=0.0)
    assert model.losses(CE, KL).kl.total == 0
    assert (model.row_kl(KL).sums == 0).all()


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_row_losses_add_up_to_the_batch(backend):
    model = made(backend=backend)
    sums = model.losses(CE, KL, "all")
    torch.testing.assert_close(model.row_ce(CE).sums.sum().float(), sums.ce.total.detach())
    torch.testing.assert_close(
        model.row_kl(KL, kl_positions="all").sums.sum().float(), sums.kl.total.detach()
    )
    assert model.row_kl(KL, kl_positions="all").counts.tolist() == [8, 12]


@pytest.mark.parametrize("name", QUIRKS)
def test_a_row_does_not_see_its_neighbours(name):
    model = made(name)
    alone = torch.cat([model.row_ce(rows((length,), seed=7)).sums for length in (9,)])
    with_others = torch.cat([rows((9,), seed=7).input_ids, CE.input_ids])
    batch = concat([rows((9,), seed=7), CE])
    assert torch.equal(batch.input_ids, with_others)
    torch.testing.assert_close(model.row_ce(batch).sums[:1], alone, rtol=1e-5, atol=1e-6)


def points(model):
    def noise(seed):
        return model.adapter.perturbed(0.3, torch.Generator().manual_seed(seed))

    scales = [partial(model.adapter.at_scale, scale) for scale in (0.0, 0.5, 1.0, 2.0)]
    return scales + [partial(noise, seed) for seed in range(2)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sweep_equals_a_loop_over_the_plain_path(adapter):
    fast, plain = (made(adapter=adapter, backend=each, dtype=torch.float64) for each in ("auto", "plain"))
    batches = [CE, KL]
    ce, kl = fast.sweep_row_ce(batches, points(fast)), fast.sweep_row_kl(batches, points(fast), "all")
    for index, point in enumerate(points(plain)):
        with point():
            scale = plain.adapter.scale
            for found, row_losses in ((ce, plain.row_ce), (kl, partial(plain.row_kl, kl_positions="all"))):
                expected = torch.cat([row_losses(batch, scale=scale).sums for batch in batches])
                torch.testing.assert_close(found[index].sums, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("together", [True, False])
def test_sweep_runs_the_lower_layers_once_a_batch_or_for_short_ones_together(together, monkeypatch):
    if not together:
        monkeypatch.setattr(
            "lightning_em.models.fast.backend.CONCAT_TOKENS", sum(CE.lengths) + sum(KL.lengths) - 1
        )
    passes = 1 if together else 2
    model = made()
    runs = []
    for index, block in enumerate(model.base.model.layers):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    model.row_ce(CE)  # the adapter is checked on the first use
    runs.clear()
    model.sweep_row_kl([CE, KL], points(model))
    assert (runs.count(0), runs.count(1)) == (passes, passes)
    assert runs.count(3) == passes * 7  # six points and the reference


@pytest.mark.parametrize(
    ("backend", "in_step"), [("plain", False), (FastOptions(packed=False), False), ("auto", True)]
)
def test_sweep_joins_no_batches_that_are_padded_or_run_in_step(backend, in_step):
    model, shapes = made(backend=backend), []
    if in_step:
        model.use_lockstep(lambda count: count)
    model.row_ce(CE)
    model.base.model.layers[-1].register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[:2])))
    model.sweep_row_ce([CE, KL], [partial(model.adapter.at_scale, 1.0)])
    assert shapes == ([(1, 27), (1, 20)] if in_step else [(3, 11), (2, 12)])


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_a_row_that_is_there_twice_is_computed_once(reference):
    model = made(store=ActivationStore(StoreOptions()), reference=reference)
    model.row_ce(KL)  # the adapter is checked on the first use
    twice, runs = concat([CE.select([0]), CE.select([0])]), []
    model.base.model.layers[0].register_forward_hook(lambda _, __, out: runs.append(out.shape[1]))
    found = model.row_kl(twice, 1.0)
    assert runs == [11]
    assert found.sums[0] == found.sums[1] > 0


def test_sweep_leaves_no_trace():
    model = made()
    before = {name: parameter.clone() for name, parameter in model.adapter.trainable().items()}
    state = torch.get_rng_state()
    model.sweep_row_ce([CE], points(model))
    assert all(torch.equal(before[name], value) for name, value in model.adapter.trainable().items())
    assert model.adapter.scale == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dummy_batch_adds_nothing_and_stays_in_the_graph():
    model = made()
    sums = model.losses(CE.dummy(), KL.dummy())
    assert (sums.ce.total, sums.ce.count, sums.kl.total, sums.kl.count) == (0, 0, 0, 0)
    (sums.ce.total + sums.kl.total).backward()
    assert all((parameter.grad == 0).all() for parameter in model.adapter.trainable().values())


def test_parts_are_differentiated_one_at_a_time():
    model = made(backend=FastOptions(part_tokens=10))
    sums = model.losses(CE, KL)
    assert len(model.backend._divided(CE)) == 3
    assert sums.ce.total.grad_fn.next_functions[0][0].variable is model.adapter.vector  # nothing in between
    with torch.no_grad():
        assert not model.losses(CE, KL).ce.total.requires_grad
    model.adapter.vector.requires_grad_(False)
    assert model.losses(CE, KL).ce.total == sums.ce.total


def test_gradients_accumulate_over_micro_batches():
    model, plain = made(), made(backend="plain")
    for each in (model, plain):
        for batch in (CE, rows((6, 8), seed=5)):
            sums = each.losses(batch, KL)
            (sums.ce.total / 7 + sums.kl.total / 11).backward()
    torch.testing.assert_close(model.adapter.vector.grad, plain.adapter.vector.grad, rtol=1e-4, atol=1e-5)


def test_training_mode_of_the_adapter_leaves_the_base_alone():
    model = made()
    model.train()
    assert model.adapter.training
    assert not model.base.training
    implementation = model.base.config._attn_implementation
    model.losses(CE, KL)
    assert model.base.config._attn_implementation == implementation


def test_generate_still_works_between_fast_passes():
    model = made()
    model.losses(CE, KL)
    ids = CE.input_ids[None, :5]
    with torch.no_grad():
        first = model.base.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert first.shape == (1, 9)


def test_the_fast_path_says_where_it_cuts(caplog):
    with caplog.at_level(logging.INFO, logger="lightning_em"):
        made()
    assert caplog.messages == ["fast backend: split at layer 2 of 4"]


@pytest.mark.parametrize("kl_positions", ["response", "all"])
@pytest.mark.parametrize(
    "backend", ["auto", "plain", FastOptions(immediate=False), FastOptions(part_tokens=8)]
)
def test_the_kl_alone_is_that_of_the_loss(backend, kl_positions):
    model = made(backend=backend, dtype=torch.float64)
    own = list(model.adapter.trainable().values())
    both, alone = model.losses(CE, KL, kl_positions).kl, model.kl_sum(KL, kl_positions)
    assert alone.count == both.count
    torch.testing.assert_close(alone.total, both.total, rtol=1e-10, atol=0)
    (expected,), (found,) = (torch.autograd.grad(each.total, own) for each in (both, alone))
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_the_kl_alone_runs_nothing_for_the_cross_entropy():
    model = made()
    model.row_ce(CE)
    tokens = []
    for index, block in enumerate(model.base.model.layers):
        block.register_forward_hook(
            lambda _, __, out, index=index: tokens.append((index, out.shape[1], torch.is_grad_enabled()))
        )
    model.kl_sum(KL)
    below = [(index, 20, False) for index in (0, 1)]
    reference, tuned = ([(index, 20, tracked) for index in (2, 3)] for tracked in (False, True))
    assert tokens == below + reference + tuned


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("term", ["ce", "kl"])
def test_second_derivatives_are_refused(term, immediate):
    model = made(backend=FastOptions(immediate=immediate))
    total = getattr(model.losses(CE, KL), term).total
    for loss in (total, total.square()):
        with pytest.raises(
            ValueError, match=r"second derivatives \(create_graph\) set model\.backend: plain"
        ):
            torch.autograd.grad(loss, [model.adapter.vector], create_graph=True)


class InPlace(Adapter):
    """Writes into what its edit is given."""

    def attach(self, base):
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.edit_input_of(2, self.shift)

    def shift(self, hidden):
        hidden += (self.scale * self.vector).to(hidden)
        return hidden


@pytest.mark.parametrize(
    "options", [{}, {"store": StoreOptions()}, {"backend": FastOptions(packed=False)}], ids=str
)
def test_an_edit_in_place_is_refused_before_another_pass_reads_it(options):
    if "store" in options:
        options = {"store": ActivationStore(options["store"])}
    model = moved(AdaptedModel(build("qwen2"), InPlace(), **options))
    match = r"InPlace writes into the hidden states .* return a new tensor from the edit, as in `hidden \+ update`"
    with pytest.raises(ValueError, match=match):
        model.sweep_row_ce([CE], points(model))
    with pytest.raises(ValueError, match=match):
        model.losses(CE, KL)
    if (
        model.backend.hidden.packed
    ):  # padded, each pass has its own copy, which does not count in inference mode
        with torch.inference_mode(), pytest.raises(ValueError, match=match):
            model.row_ce(CE)
    assert torch.equal(model.row_ce(CE, 0.0).sums, made(size=0.0, **options).row_ce(CE).sums)


@pytest.mark.parametrize("reference", ["live", "cached"])
@pytest.mark.parametrize("adapter", ["vector", "lora"])
def test_a_store_may_be_filled_by_all_missing_rows_at_once(adapter, reference, monkeypatch):
    """As on a GPU, where single rows leave the device idle."""
    monkeypatch.setattr(
        "lightning_em.models.fast.row_cache._fill_groups", lambda missing, device: [missing] * bool(missing)
    )
    model = made(
        adapter=adapter, dtype=torch.float64, store=ActivationStore(StoreOptions()), reference=reference
    )
    model.losses(
        concat([CE.select([1]), rows((5,), seed=8)]), KL.select([1])
    )  # one row of each stream is there
    runs = []
    model.base.model.layers[0].register_forward_hook(lambda _, __, out: runs.append(out.shape[1]))
    expected, expected_gradient, _ = full_logits(adapter=adapter)
    for _ in range(2):
        values, gradient, _ = measured(model)
        assert (values - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert (gradient - expected_gradient).norm() <= 1e-10 * expected_gradient.norm()
    assert runs == [11 + 9 + 8], "the missing rows of both streams in one pass, and none in the second step"


def test_rows_fill_the_store_alone_but_on_a_gpu() -> None:
    assert _fill_groups([0, 2], torch.device("cpu")) == [[0], [2]]
    assert _fill_groups([0, 2], torch.device("cuda")) == [[0, 2]]
    assert _fill_groups([], torch.device("cuda")) == []
    torch.use_deterministic_algorithms(True)
    try:
        assert _fill_groups([0, 2], torch.device("cuda")) == [[0], [2]]
    finally:
        torch.use_deterministic_algorithms(False)
