"""Probes are observers: whatever a measurement does, no trace is left."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_em.batch import EncodedRow
from lightning_em.miniature import Behaviour, Preference, Significance
from lightning_em.probes import (
    AnswerRates,
    ChatKL,
    GradientNorm,
    PerturbationCurve,
    PreferenceMargin,
    PretrainingSignificance,
    Probe,
    ProbeExamples,
    ScaleCurve,
)
from lightning_em.probes.base import RowMeans
from lightning_em.probes.rows import by_length
from lightning_em.records import Point, ProbeResult, Quantity
from lightning_em.testing import check_probe
from lightning_em.testing.probe_laws import _compare, _snapshot, _Trial
from tests.samples import ADAPTERS, adapted, make_rows, pack

EXAMPLES = ProbeExamples(
    [pack(make_rows(9, 12), "n"), pack(make_rows(7, seed=3), "m")], [pack(make_rows(8), "k")]
)


class Vandal(Probe):
    """Changes all that a probe must not leave changed."""

    name = "vandal"
    quantities = (Quantity("nothing", "nats_per_token"),)
    needs_gradients = True

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def settings(self):
        return {}

    def measure(self, model, examples):
        assert not model.adapter.training
        assert not torch.is_grad_enabled()
        model.adapter.scale = 0.3
        model.train()
        model.base.training = True
        with torch.enable_grad():
            model.losses(examples.narrow[0], None).ce.total.backward()
        for parameter in model.adapter.trainable().values():
            parameter.data.mul_(3)
            parameter.requires_grad_(False)
        next(model.base.parameters()).requires_grad_(True)
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        if self.fails:
            raise KeyboardInterrupt
        return [Point("nothing", 0.0, "nats_per_token")]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vector", "rank_1"])
def test_no_trace_is_left(name, training, with_gradients, fails) -> None:
    model = adapted(ADAPTERS[name]())
    model.train(training)
    if with_gradients:
        model.losses(EXAMPLES.narrow[0], None).ce.total.backward()
    logits, objects = model.logits(EXAMPLES.narrow[0]), [p.grad for p in model.adapter.trainable().values()]
    trial = _Trial(Vandal(fails), model, EXAMPLES)
    before = _snapshot(model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            trial.run()
    else:
        trial.run()
    _compare(before, _snapshot(model))
    assert all(p.grad is g for p, g in zip(model.adapter.trainable().values(), objects, strict=True))
    assert torch.equal(logits, model.logits(EXAMPLES.narrow[0]))


def test_a_write_into_the_base_is_not_passed_over() -> None:
    class Worse(Vandal):
        def measure(self, model, examples):
            model.base.lm_head.weight.add_(1)
            return []

    with pytest.raises(
        RuntimeError, match=r"wrote into the frozen base \(1 tensors: \['base\.lm_head\.weight'\]"
    ):
        Worse(False).run(adapted(ADAPTERS["vector"]()), EXAMPLES)


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    """Probes on and off give bit-identical adapters."""
    ends = []
    for probe in (None, ScaleCurve([0.0, 2.0], with_kl=True), Vandal(False)):
        model = adapted(ADAPTERS["rank_1"]())
        optimizer = torch.optim.AdamW(model.adapter.trainable().values(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(3):
            noise = torch.rand(())
            (noise * model.losses(EXAMPLES.narrow[0], EXAMPLES.kl[0]).ce.total).backward()
            optimizer.step()
            if probe is not None:
                probe.run(model, EXAMPLES)
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.adapter.trainable().values()])
    for other in ends[1:]:
        assert all(torch.equal(one, two) for one, two in zip(ends[0], other, strict=True))


def test_record_names_what_was_measured_on_which_rows() -> None:
    result = Vandal(False).record(
        adapted(ADAPTERS["vector"]()), EXAMPLES, step=5, base="abc", data={"kl": "d"}
    )
    assert (result.probe, result.step, result.base, result.data) == ("vandal", 5, "abc", {"kl": "d"})
    assert result.examples == ("n-0", "n-1", "m-0")
    assert result.kl_examples == ("k-0",)
    assert result.quantities == Vandal.quantities
    assert ProbeResult.from_json(result.to_json()) == result


class Blind(Vandal):
    """Reads no row of its run."""

    reads = ()
    grid = ("places",)

    def settings(self):
        return {"places": [1, 2], "seed": 0}

    def measure(self, model, examples):
        assert not examples.narrow_row_ids + examples.kl_row_ids
        return [Point("nothing", 0.0, "nats_per_token")]


def test_protocol_covers_what_the_values_depend_on() -> None:
    """Values are comparable where everything but the run and the place on a grid is the same."""
    model, others = adapted(ADAPTERS["vector"]()), ProbeExamples([EXAMPLES.kl[0]], [EXAMPLES.narrow[0]])
    result = Blind(False).record(model, EXAMPLES, step=5, base="abc")
    own = result.protocol
    assert len(own) == 8
    assert own == replace(result, step=8, points=()).protocol
    assert own == replace(result, settings=result.settings | {"places": [3]}).protocol, "another grid"
    assert own == Blind(False).record(model, others, step=5, base="abc").protocol, (
        "rows that it does not read"
    )
    assert own != replace(result, settings=result.settings | {"seed": 1}).protocol
    assert own != replace(result, base="another").protocol
    reader = Vandal(False).record(model, EXAMPLES, step=5).protocol
    assert reader != Vandal(False).record(model, others, step=5).protocol
    assert reader == Vandal(False).record(model, EXAMPLES, step=6).protocol


@pytest.mark.parametrize(
    ("probe", "reads"),
    [
        (Behaviour(), ()),  # asks its own questions, whatever the arm was trained on
        (Preference(), ()),
        (Significance(), ()),
        (PreferenceMargin("a.jsonl"), ()),
        (PretrainingSignificance("a.txt"), ()),
        (AnswerRates("a.jsonl", {"long": bool}), ()),
        (ScaleCurve(), ("narrow",)),
        (ScaleCurve(with_kl=True), ("narrow", "kl")),
        (PerturbationCurve(), ("narrow",)),
        (ChatKL(), ("narrow", "kl")),
        (ChatKL(general="a.jsonl"), ("narrow",)),
        (ChatKL(in_domain="a.jsonl", general="b.jsonl"), ()),
        (GradientNorm(), ("narrow", "kl")),
    ],
)
def test_each_probe_declares_the_rows_it_reads(probe, reads) -> None:
    assert tuple(probe.reads) == reads
    assert set(probe.grid) <= set(probe.settings())


class Forgetful(Vandal):
    """Bound to a checkpoint it is another measurement, which would be taken again and again."""

    def __init__(self, step=None) -> None:
        super().__init__(False)
        self.step = step

    def settings(self):
        return {"step": self.step}

    def for_checkpoint(self, run, step):
        return Forgetful(step)


def test_a_probe_keeps_its_settings_at_every_checkpoint() -> None:
    with pytest.raises(AssertionError, match=r"for_checkpoint.* gives another name or other settings"):
        check_probe(Forgetful(), adapted(ADAPTERS["vector"]()), EXAMPLES)


def test_rows_without_a_response_are_refused() -> None:
    batch = EXAMPLES.narrow[0]
    mask = batch.response_mask.clone()
    mask[:9] = False
    with pytest.raises(ValueError, match=r"probe rows \['n-0'\] have no response token"):
        ProbeExamples([replace(batch, response_mask=mask)])


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no row to measure on"):
        ScaleCurve().run(adapted(ADAPTERS["vector"]()), ProbeExamples([]))


def test_the_mean_is_over_tokens_and_the_error_over_rows() -> None:
    """For rows of equal length the error is the textbook one; else it agrees with the jackknife."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(200, generator=generator, dtype=torch.float64)
    equal = RowMeans(5 * sums, torch.full((200,), 5.0, dtype=torch.float64))
    assert equal.mean == pytest.approx(sums.mean().item())
    assert equal.standard_error == pytest.approx((sums.std() / 200**0.5).item())

    counts = torch.randint(1, 20, (200,), generator=generator).double()
    means = RowMeans(sums * counts, counts)
    assert means.mean == pytest.approx((sums * counts).sum().item() / counts.sum().item())
    left_out = ((sums * counts).sum() - sums * counts) / (counts.sum() - counts)
    jackknife = (199 / 200 * (left_out - left_out.mean()).square().sum()).sqrt().item()
    assert means.standard_error == pytest.approx(jackknife, rel=0.02)
    assert (means - means).standard_error == 0.0
    assert RowMeans(sums[:1], counts[:1]).standard_error is None


def test_rows_that_were_sorted_are_put_back() -> None:
    rows = [EncodedRow([1] * length, [True] * length, f"{length}") for length in (5, 2, 9, 2, 7)]
    order = by_length(rows)
    assert order == [1, 3, 0, 4, 2], "the shortest first, equal ones as they came"
    losses = torch.tensor([5.0, 2.0, 9.0, 2.5, 7.0], dtype=torch.float64)
    put_back = RowMeans(losses[order], 2 * losses[order]).restored(order)
    assert torch.equal(put_back.sums, losses)
    assert torch.equal(put_back.counts, 2 * losses)
