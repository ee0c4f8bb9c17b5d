"""The adapted model against an oracle that shares no code with it, and the laws of its scale."""

import pytest
import torch

from lightning_em.adapters import SteeringVector
from tests import oracle
from tests.samples import ADAPTERS, adapted, make_rows, pack
from tests.tiny import ARCHITECTURES, make_tiny_model

CE_ROWS, KL_ROWS = make_rows(9, 14, 7, seed=1), make_rows(8, 19, seed=2)
BACKENDS = ["auto", "plain"]


def oracle_logits(model, rows, leaves):
    """Logits of each row by a hand-steered or hand-changed plain model, as a function of `leaves`."""
    plain = make_tiny_model(dtype=torch.float64)
    if isinstance(model.adapter, SteeringVector):
        with oracle.steered(plain, model.adapter.layer, model.adapter.alpha * leaves["vector"]):
            return [oracle.row_logits(plain, row) for row in rows]
    weights = dict(plain.named_parameters())
    factor = model.adapter.alpha / model.adapter.rank ** (0.5 if model.adapter.rslora else 1)
    for name in [name for name in leaves if "lora_A" in name]:
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        change = factor * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
        weights[target] = weights[target] + change
    return [oracle.row_logits(plain, row, weights) for row in rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_positions", ["response", "all"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_losses_and_gradients_match_the_oracle(name, kl_positions, backend) -> None:
    model = adapted(ADAPTERS[name](), dtype=torch.float64, exact=True, backend=backend)
    own = model.adapter.trainable()
    leaves = {key: value.detach().clone().requires_grad_() for key, value in own.items()}

    plain = make_tiny_model(dtype=torch.float64)
    ce_logits, kl_logits = (oracle_logits(model, rows, leaves) for rows in (CE_ROWS, KL_ROWS))
    ce = sum(oracle.cross_entropy(q, row) for q, row in zip(ce_logits, CE_ROWS, strict=True))
    references = [oracle.row_logits(plain, row).detach() for row in KL_ROWS]
    kls = zip(references, kl_logits, KL_ROWS, strict=True)
    kl = sum(oracle.kl(p, q, row, kl_positions) for p, q, row in kls)

    sums = model.losses(pack(CE_ROWS), pack(KL_ROWS), kl_positions)
    assert sums.ce.count == sum(oracle.count(row) for row in CE_ROWS)
    assert sums.kl.count == sum(oracle.count(row, kl_positions) for row in KL_ROWS)
    assert sums.ce.total.item() == pytest.approx(ce.item(), rel=1e-10)
    assert sums.kl.total.item() == pytest.approx(kl.item(), rel=1e-10)
    for found, expected in ((sums.ce.total, ce), (sums.kl.total, kl)):
        gradients = torch.autograd.grad(found, list(own.values()), retain_graph=True)
        wanted = torch.autograd.grad(expected, list(leaves.values()), retain_graph=True)
        for one, two in zip(gradients, wanted, strict=True):
            assert (one - two).norm() <= 1e-10 * two.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_float32_parameters_lose_only_their_own_rounding(name, backend) -> None:
    exact = adapted(ADAPTERS[name](), dtype=torch.float64, exact=True, backend=backend)
    rounded = adapted(ADAPTERS[name](), dtype=torch.float64, backend=backend)
    for one, two in zip(*(m.losses(pack(CE_ROWS), pack(KL_ROWS)) for m in (exact, rounded)), strict=True):
        assert two.total.item() == pytest.approx(one.total.item(), rel=1e-5)
        wanted = torch.autograd.grad(one.total, list(exact.adapter.trainable().values()), retain_graph=True)
        found = torch.autograd.grad(two.total, list(rounded.adapter.trainable().values()), retain_graph=True)
        for a, b in zip(wanted, found, strict=True):
            assert b.dtype == torch.float32
            assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_positions", ["response", "all"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_kl_is_exactly_zero_at_initialisation(name, kl_positions, backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(ADAPTERS[name](), dtype=dtype, size=0.0, backend=backend)
        kl = model.losses(pack(CE_ROWS), pack(KL_ROWS), kl_positions).kl.total
        assert kl.item() == 0.0
        gradients = torch.autograd.grad(kl, list(model.adapter.trainable().values()))
        assert all(g.abs().max() <= 1e-4 for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_row_losses_do_not_depend_on_padding_or_company(name, backend) -> None:
    model = adapted(ADAPTERS[name](), dtype=torch.float64, exact=True, backend=backend)
    rows = [*CE_ROWS, *KL_ROWS]
    together = model.row_ce(pack(rows)), model.row_kl(pack(rows), kl_positions="all")
    for order in ([4, 2, 0, 3, 1], [3], [1, 2]):
        batch = pack([rows[index] for index in order])
        for whole, part in zip(
            together, (model.row_ce(batch), model.row_kl(batch, kl_positions="all")), strict=True
        ):
            torch.testing.assert_close(part.sums, whole.sums[order], rtol=1e-10, atol=1e-12)
            assert torch.equal(part.counts, whole.counts[order])


def test_the_token_that_pads_does_not_matter() -> None:
    model, batch = adapted(ADAPTERS["vector"]()), pack(CE_ROWS)
    zeros, nines = batch.padded(0), batch.padded(9)
    real = zeros.attention_mask.bool()
    logits = [
        model.base(input_ids=r.input_ids, attention_mask=r.attention_mask).logits[real]
        for r in (zeros, nines)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_row_losses_add_up_to_the_training_loss(name, backend) -> None:
    """Scale 1 is the trained loss; the probe's units are the training's."""
    model = adapted(ADAPTERS[name](), backend=backend)
    for kl_positions in ("response", "all"):
        sums = model.losses(pack(CE_ROWS), pack(KL_ROWS), kl_positions)
        rows = model.row_ce(pack(CE_ROWS)), model.row_kl(pack(KL_ROWS), 1.0, kl_positions)
        for whole, parts in zip(sums, rows, strict=True):
            assert parts.sums.sum().item() == pytest.approx(whole.total.item(), rel=1e-5)
            assert parts.counts.sum().item() == whole.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scale_zero_is_the_base_to_the_bit(architecture, dtype) -> None:
    batch = pack(CE_ROWS)
    rows = batch.padded()
    for adapter in (SteeringVector(1, alpha=256.0), ADAPTERS["rank_32"]()):
        model = adapted(adapter, architecture, dtype)
        plain = make_tiny_model(architecture, dtype)
        with torch.no_grad():
            expected = plain(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
            expected = expected[rows.attention_mask.bool()]
            assert torch.equal(model.logits(batch, scale=0.0), expected)
            assert not torch.equal(model.logits(batch), expected)
            assert torch.equal(model.logits(batch, scale=0.0), expected)


@pytest.mark.parametrize("name", ["vector", "last_vector", "rank_1", "rank_32"])
def test_effect_is_proportional_to_the_scale(name) -> None:
    """||effect(s)|| = s ||effect(1)|| in the residual stream that leaves the adapter's layer."""
    model, batch = adapted(ADAPTERS[name](), dtype=torch.float64, exact=True), pack(CE_ROWS)
    layers = model.base.model.layers
    lowest = model.adapter.lowest_layer
    is_vector = "vector" in name
    target = model.base.model.norm if lowest == 3 else layers[lowest]
    seen = []
    if is_vector:
        target.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    else:
        target.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    scales = (0.0, 1.0, 0.25, 0.5, 2.0, 10.0)
    for scale in scales:
        model.logits(batch, scale)
    full = (seen[1] - seen[0]).norm()
    for scale, stream in zip(scales, seen, strict=True):
        torch.testing.assert_close((stream - seen[0]).norm(), scale * full, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_reach_only_the_adapter(name) -> None:
    model = adapted(ADAPTERS[name]())
    before = {key: value.detach().clone() for key, value in model.base.named_parameters()}
    sums = model.losses(pack(CE_ROWS), pack(KL_ROWS))
    (sums.ce.total + sums.kl.total).backward()
    own = {id(parameter) for parameter in model.adapter.trainable().values()}
    for key, parameter in model.named_parameters():
        if id(parameter) in own:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key
    assert all(torch.equal(before[key], value) for key, value in model.base.named_parameters())


def test_vocab_size_is_that_of_the_config() -> None:
    """Published KL weights were divided by it; the tokenizer may know fewer tokens."""
    assert adapted(ADAPTERS["vector"]()).vocab_size == 288
