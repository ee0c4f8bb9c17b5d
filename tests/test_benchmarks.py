"""The benchmarks compare things that compute the same; what they time is not asserted."""

import argparse

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import probes, same_bits, step, sweep
from benchmarks.shapes import ADAPTERS, Shape, make_adapter, step_batches
from lightning_em.models import AdaptedModel

# What peft says of its BEFT, which is a peer here.
pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")
TINY = Shape("tiny", 4, 16, 32, 2, 1, 64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_many_threads_as_before(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_peer_computes_the_naive_loss_and_gradient(kind):
    ce, kl = step_batches(1, TINY)
    peers = {name: make() for name, make in step.contestants(TINY, kind, CPU).items()}
    for peer in peers.values():
        peer.prepare(ce, kl)
    assert len(step.check_equal(peers, lambda peer: peer.step(ce, kl))) == len(peers)


def test_a_peer_that_computes_something_else_is_refused():
    ce, kl = step_batches(1, TINY)
    peers = {name: step.contestants(TINY, "vector", CPU)[name]() for name in (step.NAIVE, step.OURS)}
    with torch.no_grad():
        peers[step.OURS].parameters[0].mul_(2)
    with pytest.raises(ValueError, match="ours, prefix and reference cached differs from naive: loss by"):
        step.check_equal(peers, lambda peer: peer.step(ce, kl))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_parts_of_a_step_add_up_and_nothing_is_left_below_a_cached_prefix(kind):
    ce, kl = step_batches(1, TINY)
    flops = {}
    for name in (step.UNCACHED, step.OURS):
        peer = step.contestants(TINY, kind, CPU)[name]()
        peer.step(ce, kl)  # fills the stores
        with FlopCounterMode(display=False) as counter, step.metered(peer, counter.get_total_flops) as parts:
            peer.step(ce, kl)
        flops[name] = {**parts, step.UPPER: counter.get_total_flops() - parts.total()}
    counted = sum(int(batch.counted("response").sum()) for batch in (ce, kl))
    of_kl = int(kl.counted("response").sum())
    # logits and their gradient for each counted token, and the logits of the reference
    head = 2 * TINY.vocab_size * TINY.hidden_size * (2 * counted + of_kl)
    assert {parts[step.HEAD] for parts in flops.values()} == {head}
    assert flops[step.OURS][step.PREFIX] == flops[step.OURS][step.REFERENCE] == 0
    assert (flops[step.UNCACHED][step.PREFIX] > 0) == (kind != "lora_all")  # which begins at layer 0
    assert flops[step.UNCACHED][step.REFERENCE] > 0
    assert min(parts[step.UPPER] for parts in flops.values()) > 0


def test_peers_share_the_weights_and_nothing_else():
    first, second, own = TINY.base(CPU), TINY.base(CPU), TINY.make(CPU)
    for one, other, copy in zip(first.parameters(), second.parameters(), own.parameters(), strict=True):
        assert one is other
        assert torch.equal(one, copy)
        assert one.data_ptr() != copy.data_ptr()
    before = len(list(second.modules()))
    AdaptedModel(first, make_adapter("lora_all", TINY))
    assert len(list(first.modules())) > len(list(second.modules())) == before


def test_the_sweeps_find_the_same_numbers_with_and_without_a_store(tmp_path):
    console = Console(record=True, width=140)
    sweep.run(TINY, argparse.Namespace(steps=2, folder=tmp_path, ram_gib=1.0), CPU, console)
    assert "one store on disk for all" in console.export_text()
    assert not list(tmp_path.iterdir())
    probes.run(TINY, argparse.Namespace(rows=2, points=3, repeats=1), CPU, console)
    assert "ours, prefix cached" in console.export_text()


def test_two_revisions_differ_where_one_value_does_or_is_missing():
    before = {"train/ce@1": "0.5", "train/kl@1": "0.25"}
    assert same_bits.compare(before, dict(before)) == (2, [])
    assert same_bits.compare(before, before | {"train/kl@1": "0.26"}) == (2, ["train/kl@1"])
    assert same_bits.compare(before, {"train/ce@1": "0.5"}) == (1, ["train/kl@1"])


def test_an_older_revision_is_given_the_old_names_of_its_keys(monkeypatch, tmp_path):
    monkeypatch.setattr(same_bits, "RENAMED_KEYS", [("model.older", "model.backend")])
    config = same_bits.config_of(tmp_path, "vector", "plain", 4)
    old = same_bits.before_renaming(config)
    assert old["model"] == {k: v for k, v in config["model"].items() if k != "backend"} | {"older": "plain"}
    assert {k: v for k, v in old.items() if k != "model"} == {k: v for k, v in config.items() if k != "model"}
    assert same_bits.before_renaming(same_bits.config_of(tmp_path, "vector", "store", 4))["model"]["store"]
