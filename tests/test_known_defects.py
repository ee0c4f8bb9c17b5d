"""Defects that were found in code others released for the same study: each has a test that would catch it.

The numbers are those of the project's list; 3, 4, 7 and 10 concern data, resuming and sampling.
"""

import pytest
import torch
from torch import nn

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.losses import token_kl
from lightning_em.models import AdaptedModel
from lightning_em.probes import PerturbationCurve, ProbeExamples, ScaleCurve
from tests import oracle
from tests.samples import ADAPTERS, adapted, make_rows, pack
from tests.tiny import make_tiny_model

ROWS = make_rows(9, 14, 7, 11, seed=5)
BACKENDS = ["auto", "plain"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_defect_01_every_row_is_steered(name, backend) -> None:
    """A hook wrote into `output[0]` of a tensor: the first row of a batch."""
    model = adapted(ADAPTERS[name](), backend=backend)
    together, base = model.row_ce(pack(ROWS)), model.row_ce(pack(ROWS), scale=0.0)
    assert (together.sums - base.sums).abs().min() > 1e-3
    kl = model.row_kl(pack(ROWS))
    assert kl.sums.min() > 1e-3
    for index, row in enumerate(ROWS):
        alone = model.row_ce(pack([row]))
        assert alone.sums.item() == pytest.approx(together.sums[index].item(), rel=1e-4)
    steered = model.logits(pack(ROWS)).split([len(ids) for ids, _ in ROWS])
    plain = model.logits(pack(ROWS), scale=0.0).split([len(ids) for ids, _ in ROWS])
    assert all(not torch.equal(one, two) for one, two in zip(steered, plain, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_defect_02_probe_and_training_share_adapter_and_mask(name, backend) -> None:
    """Probe and training used different hooks and masks."""
    model = adapted(ADAPTERS[name](), backend=backend)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trained = model.losses(pack(ROWS), pack(ROWS))
    points = ScaleCurve([0.0, 1.0], with_kl=True).run(model, ProbeExamples([pack(ROWS)], [pack(ROWS)]))
    measured = {p.quantity: p for p in points if p.coordinates.get("scale") == 1.0}
    for quantity, loss in (("ce", trained.ce), ("kl", trained.kl)):
        assert measured[quantity].value == pytest.approx(loss.total.item() / loss.count, rel=1e-5)
        assert measured[quantity].count == loss.count
    points = PerturbationCurve([0.5], num_seeds=1).run(model, ProbeExamples([pack(ROWS)]))
    [unmoved] = [p for p in points if p.quantity == "ce" and p.coordinates["strength"] == 0.0]
    assert unmoved.value == pytest.approx(trained.ce.total.item() / trained.ce.count, rel=1e-5)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize(("alpha", "rslora"), [(256.0, False), (256.0, True), (0.5, False)])
@pytest.mark.parametrize("rank", [1, 4])
def test_defect_05_scale_one_is_the_trained_adapter(rank, alpha, rslora) -> None:
    """Scaling rank 1 did not give the trained adapter at 1.0, and norms ignored alpha / rank."""
    model = adapted(LoRA(rank, alpha, ["down_proj"], [1], rslora), dtype=torch.float64, exact=True)
    rows = pack(ROWS)
    trained = model.base(**rows.padded()._asdict()).logits[rows.padded().attention_mask.bool()]
    assert torch.equal(model.logits(rows, scale=1.0), trained)
    a, b = (p.detach() for p in model.adapter.trainable().values())
    change = alpha / (rank**0.5 if rslora else rank) * b @ a
    assert model.adapter.effective_norm().item() == pytest.approx(change.norm().item(), rel=1e-6)
    site = model.base.model.layers[1].mlp.down_proj
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 0.1, 1.0, 3.0):
        with torch.no_grad(), model.adapter.at_scale(scale):
            effect = site(x) - site.base_layer(x)
        torch.testing.assert_close(effect, scale * x @ change.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_defect_06_reference_is_the_same_model_at_scale_zero(backend) -> None:
    """Reference logits came from a second model and were matched to batches by a counter."""
    model = adapted(ADAPTERS["rank_1"](), backend=backend)
    plain = make_tiny_model()
    own = sum(p.numel() for p in model.adapter.trainable().values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + own

    def oracle_kl(row):
        logits = oracle.row_logits(model.base, row)
        return oracle.kl(oracle.row_logits(plain, row), logits, row).item()

    with torch.no_grad():
        expected = [oracle_kl(row) for row in ROWS]
        for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [2, 2]):  # shuffled, repeated, resumed in the middle
            kl = model.row_kl(pack([ROWS[index] for index in order]))
            assert kl.sums.tolist() == pytest.approx([expected[index] for index in order], rel=1e-4)
        for parameter in model.adapter.trainable().values():
            parameter.add_(0.1)  # training goes on, the reference does not move
        rows = pack(ROWS).padded()
        reference = plain(**rows._asdict()).logits[rows.attention_mask.bool()]
        assert torch.equal(model.logits(pack(ROWS), scale=0.0), reference)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_positions", ["response", "all"])
def test_defect_08_padding_does_not_count(kl_positions, backend) -> None:
    """KL was averaged over padding in probes, and had two units in one code base."""
    model = adapted(SteeringVector(1, alpha=4.0), dtype=torch.float64, exact=True, backend=backend)
    short, long = ROWS[2], make_rows(60, seed=8)[0]
    alone = model.row_kl(pack([short]), 1.0, kl_positions)
    padded = model.row_kl(pack([short, long]), 1.0, kl_positions)
    assert padded.counts[0] == alone.counts[0] == oracle.count(short, kl_positions)
    assert padded.sums[0].item() == pytest.approx(alone.sums[0].item(), rel=1e-10)
    ce = [model.row_ce(pack(rows)).sums[0].item() for rows in ([short], [short, long])]
    assert ce[0] == pytest.approx(ce[1], rel=1e-10)

    probe = ScaleCurve([0.0, 1.0], with_kl=True, kl_positions=kl_positions)
    for batches in ([pack([short, long])], [pack([short]), pack([long])]):
        points = probe.run(model, ProbeExamples(batches, batches))
        [kl] = [p for p in points if p.quantity == "kl" and p.coordinates["scale"] == 1.0]
        assert kl.unit == "nats_per_token"
        sums = model.losses(pack([short]), pack([short, long]), kl_positions)
        assert kl.value == pytest.approx(sums.kl.total.item() / sums.kl.count, rel=1e-9)


@pytest.mark.parametrize("kl", [1e-3, 1e-4])
def test_defect_09_a_small_kl_survives_bf16_logits(kl) -> None:
    """Arithmetic on bf16 logits makes a small KL mostly noise; ours is float32 from the logits on."""
    generator = torch.Generator().manual_seed(0)
    reference = (3 * torch.randn(64, 288, generator=generator)).bfloat16()
    direction = torch.randn(64, 288, generator=generator)
    adapted_logits = (reference.float() + (2 * kl) ** 0.5 * direction).bfloat16().requires_grad_()
    exact = adapted_logits.detach().double().requires_grad_()
    p, q = oracle.log_probabilities(reference.double()), oracle.log_probabilities(exact)
    expected = (p.exp() * (p - q)).sum(-1)

    found = token_kl(reference, adapted_logits)
    assert found.dtype == torch.float32
    # A float32 log probability is off by about eps |log p|, however small the KL is, so that a token's KL is off by
    # about eps sum p |log p|, eps times the entropy. How the sum over the vocabulary is ordered differs by CPU.
    entropy = -(p.exp() * p).sum(-1)
    assert (found - expected).norm() <= 2 * torch.finfo(torch.float32).eps * entropy.norm()
    [gradient] = torch.autograd.grad(found.sum(), [adapted_logits])
    [wanted] = torch.autograd.grad(expected.sum(), [exact])
    assert (gradient - wanted).norm() <= 1e-2 * wanted.norm()  # the gradient itself is handed back in bf16

    naive_p, naive_q = reference.log_softmax(-1), adapted_logits.log_softmax(-1)
    naive = (naive_p.exp() * (naive_p - naive_q)).sum(-1)
    assert (naive - expected).norm() > 0.05 * expected.norm()  # so the defect would have been seen


@pytest.mark.parametrize("backend", BACKENDS)
def test_defect_09_a_small_kl_survives_a_bf16_base(backend) -> None:
    """The model's own hidden states are bf16; from there on nothing is lost."""
    model = adapted(SteeringVector(1, alpha=1.0), dtype=torch.bfloat16, size=0.02, backend=backend)
    batch = pack(ROWS)
    # The states that the loss itself was computed from: packed and padded rows round to different bf16 states.
    hidden = {}
    handle = model.base.model.norm.register_forward_hook(
        lambda _, __, output: hidden.update({model.adapter.scale: output.detach()})
    )
    sums = model.losses(batch, batch)
    handle.remove()
    if backend == "plain":  # all positions of padded rows; the fast backend keeps those that count
        counted = batch.padded().attention_mask.bool()
        hidden = {scale: states[counted][batch.counted("response")] for scale, states in hidden.items()}
    head = model.base.lm_head.weight.detach().double()
    p, q = (oracle.log_probabilities(hidden[scale].flatten(0, -2).double() @ head.T) for scale in (0.0, 1.0))
    assert len(p) == len(q) == sums.kl.count
    expected = (p.exp() * (p - q)).sum()
    assert sums.kl.total.dtype == torch.float32
    assert 1e-5 < expected / sums.kl.count < 1e-2
    # the plain backend rounds the logits to bf16 as the model does; only the fused head is exact from the states
    tolerance = 1e-3 if backend == "auto" else 0.3
    assert sums.kl.total.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["vector", "last_vector", "rank_1"])
def test_defect_11_no_autograd_node_below_the_adapter(name, checkpointing, backend) -> None:
    """Gradient checkpointing with input-require-grads ran the backward through all frozen layers."""
    base = make_tiny_model()
    if checkpointing:
        base.activation_checkpointing_enable()
    model = AdaptedModel(base, ADAPTERS[name](), backend=backend)
    model.train()
    seen: dict[str, list[bool]] = {"below": [], "above": []}
    layers = [*model.base.model.layers, model.base.model.norm]
    for index, layer in enumerate(layers):
        where = "below" if index < model.adapter.lowest_layer else "above"
        layer.register_forward_hook(
            lambda _, __, output, where=where: seen[where].append(output.requires_grad)
        )
    embeddings = []
    model.base.model.embed_tokens.register_forward_hook(
        lambda _, __, out: embeddings.append(out.requires_grad)
    )
    sums = model.losses(pack(ROWS), pack(ROWS))
    (sums.ce.total + sums.kl.total).backward()
    assert embeddings
    assert not any(embeddings)
    assert seen["below"]
    assert not any(seen["below"])
    assert any(seen["above"])


class Parent(nn.Module):
    """Stands for the LightningModule, which switches all that it holds."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("name", ADAPTERS)
def test_defect_12_the_base_stays_in_eval_mode(name) -> None:
    """Lightning calls `.train()` on everything each epoch, the dropout of the frozen base included."""
    model = adapted(ADAPTERS[name]())
    for module in model.base.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert not any(module.training for module in model.base.modules())
    before = model.row_ce(pack(ROWS)).sums
    for parent in (Parent(model), model):
        parent.train()
        assert model.training
        assert not any(module.training for module in model.base.modules())
        assert torch.equal(model.row_ce(pack(ROWS)).sums, before)
    one, two = (model.losses(pack(ROWS), None).ce.total for _ in range(2))
    assert torch.equal(one, two)
