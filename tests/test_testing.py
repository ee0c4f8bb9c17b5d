"""The contracts catch what they are there to catch: one deliberately broken plug-in a law."""

import random

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LowRank, SteeringVector
from lightning_em.probes import Probe
from lightning_em.records import Point, Quantity
from lightning_em.testing import check_adapter, check_probe
from tests.samples import ADAPTERS
from tests.tiny import ARCHITECTURES, make_tiny_model


class Shift(Adapter):
    """A good adapter, the one of the style guide."""

    def __init__(self, layer=0.5, alpha=1.0) -> None:
        super().__init__()
        self.layer, self.alpha = layer, alpha

    def attach(self, base):
        layer = self.resolve(base, self.layer)
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size, dtype=torch.float32))
        self.edit_input_of(layer, self.shift)

    def shift(self, hidden):
        return hidden + (self.scale * self.alpha * self.vector).to(hidden.dtype)

    def effective_norm(self):
        return self.alpha * self.vector.norm()


class Bottleneck(Adapter):
    """A good one without a norm: h + s (f(h) - h), f with parameters of several shapes."""

    def attach(self, base):
        self.resolve(base, 0)
        size = base.config.hidden_size
        self.down = nn.Parameter(torch.randn(3, size, generator=self.generator) / size**0.5)
        self.up = nn.Parameter(torch.zeros(size, 3))
        self.gate = nn.Parameter(torch.ones(1))
        self.edit_input_of(1, self.edit)

    def edit(self, hidden):
        change = self.gate * torch.tanh(hidden.float() @ self.down.T) @ self.up.T
        return hidden + (self.scale * change).to(hidden)


@pytest.mark.parametrize("layer", [0, 0.5, 1])
def test_the_adapter_of_the_style_guide_passes(layer) -> None:
    check_adapter(Shift(layer))
    check_adapter(lambda: Shift(layer, alpha=256.0))


def test_an_adapter_without_a_norm_passes() -> None:
    check_adapter(Bottleneck)


@pytest.mark.parametrize("name", ["vector", "rank_1", "rank_32", "all_linear"])
def test_our_own_pass(name) -> None:
    check_adapter(ADAPTERS[name]() if name != "vector" else SteeringVector(0.5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_own_pass_on_every_architecture(architecture) -> None:
    base = make_tiny_model(architecture)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    check_adapter(ADAPTERS["rank_1" if architecture in {"gemma2", "qwen3", "llama"} else "vector"](), base)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.modules())


class OnlyRowZero(Shift):
    def shift(self, hidden):
        steered = hidden.clone()
        steered[0] = super().shift(hidden[0])
        return steered


class MeanOverBatch(Shift):
    def shift(self, hidden):
        return hidden + (self.scale * self.vector * hidden.mean(0, keepdim=True)).to(hidden)


class SquaredScale(Shift):
    def shift(self, hidden):
        return hidden + (self.scale**2 * self.vector).to(hidden)


class DeafToScale(Shift):
    def shift(self, hidden):
        return hidden + self.vector.to(hidden)


class NotOffAtZero(Shift):
    def attach(self, base):
        super().attach(base)
        base.model.norm.register_forward_pre_hook(
            lambda _, args: (args[0] + self.vector.sum().to(args[0]) * 1e-3,)
        )


class Remembers(Shift):
    """Leaves something behind in the base when it runs at full scale."""

    def shift(self, hidden):
        if self.scale == 2:
            self._base.model.norm.weight.data += 0.1
        return super().shift(hidden)


class TrainsTheBase(Shift):
    def attach(self, base):
        super().attach(base)
        base.lm_head.weight.requires_grad_(True)


class OwnsTheBase(Shift):
    def attach(self, base):
        super().attach(base)
        base.model.norm.weight.requires_grad_(True)
        self.norm = base.model.norm.weight


class WritesIntoTheBase(Shift):
    def attach(self, base):
        super().attach(base)
        base.lm_head.weight.data *= 1.5


class StartsSomewhere(Shift):
    def attach(self, base):
        super().attach(base)
        self.vector.data.normal_(generator=self.generator)


class Unused(Shift):
    def attach(self, base):
        super().attach(base)
        self.spare = nn.Parameter(torch.zeros(2))


class Detached(Shift):
    def shift(self, hidden):
        return hidden + (self.scale * self.vector.detach()).to(hidden)


class FloatsTheStream(Shift):
    def shift(self, hidden):
        return hidden + self.scale * self.vector


class HalfParameters(Shift):
    def attach(self, base):
        super().attach(base)
        self.vector.data = self.vector.data.to(base.dtype)


class ChangesBelow(Shift):
    """Says it edits the input of layer 1, but edits the output of layer 0."""

    def attach(self, base):
        self.vector = nn.Parameter(torch.zeros(base.config.hidden_size))
        self.lowest_layer = 1
        base.model.layers[0].register_forward_hook(lambda _, __, out: self.shift(out) if self.scale else out)


class ChangesEmbeddings(Shift):
    def attach(self, base):
        super().attach(base)
        self.lowest_layer = 0
        base.model.embed_tokens.register_forward_hook(
            lambda _, __, out: self.shift(out) if self.scale else out
        )


class WritesInPlace(Shift):
    def shift(self, hidden):
        hidden += (self.scale * self.vector).to(hidden)
        return hidden


class Forgets(Shift):
    """Something that matters is not saved."""

    def attach(self, base):
        super().attach(base)
        self.direction = torch.randn(base.config.hidden_size, generator=self.generator)

    def shift(self, hidden):
        return hidden + (self.scale * self.vector * self.direction).to(hidden)

    def effective_norm(self):
        return (self.vector * self.direction).norm()


class LoadsNothing(Shift):
    def load(self, folder):
        pass


class SavesItself(Shift):
    def save(self, folder):
        super().save(folder)


class PerturbsForGood(Shift):
    def perturbed(self, strength, generator):
        self.vector.data += strength * torch.randn(self.vector.shape, generator=generator)
        return super().perturbed(strength, generator)


class NormWithoutAlpha(Shift):
    def __init__(self) -> None:
        super().__init__(alpha=4.0)

    def effective_norm(self):
        return self.vector.norm()


class NormOfTheParameters(Adapter):
    """Low rank, with the norm of the matrices instead of that of their product."""

    def attach(self, base):
        size = base.config.hidden_size
        self.down = nn.Parameter(torch.randn(2, size, generator=self.generator) / size**0.5)
        self.up = nn.Parameter(torch.zeros(size, 2))
        self.edit_input_of(self.resolve(base, 1), self.edit)

    def edit(self, hidden):
        return hidden + (self.scale * (hidden.float() @ self.down.T) @ self.up.T).to(hidden)

    def effective_norm(self):
        return (self.down.square().sum() + self.up.square().sum()).sqrt()


class NormOfTheScale(Shift):
    def effective_norm(self):
        return self.scale * self.vector.norm()


class DeclaresAnotherShift(Shift):
    def update(self):
        return [LowRank(self.lowest_layer, "vector", factor=2 * self.alpha)]


class DeclaresAnotherProduct(NormOfTheParameters):
    """Edits the stream, and says that it changes a weight."""

    def effective_norm(self):
        return None

    def update(self):
        return [LowRank("model.layers.1.self_attn.o_proj", "up", "down")]


@pytest.mark.parametrize(
    ("adapter", "law"),
    [
        (OnlyRowZero, r"Every batch row changes, whatever shares its batch': rows \[1, 2\] of 3"),
        (MeanOverBatch, r"Every batch row changes.*comes out differently in a batch and alone"),
        (SquaredScale, r"effect\(s\).*at scale 0\.25 the .* changes by 0\.0625 times"),
        (DeafToScale, r"effect\(s\)"),
        (NotOffAtZero, r"Scale 0 is the frozen base exactly"),
        (Remembers, r"Scale 0 is the frozen base exactly.*after scale 2\.0"),
        (TrainsTheBase, r"Gradients reach only the adapter': the base is trained too: \['lm_head\.weight'\]"),
        (OwnsTheBase, r"leaves the base as it was': trainable\(\) holds parameters of the base"),
        (WritesIntoTheBase, r"leaves the base as it was': attach wrote into \['lm_head\.weight'\]"),
        (StartsSomewhere, r"leaves the base as it was'.*must start at no update"),
        (Unused, r"Gradients reach only the adapter': no gradient reaches \['spare'\]"),
        (Detached, r"Gradients reach only the adapter"),
        (FloatsTheStream, r"A bf16 base works"),
        (HalfParameters, r"A bf16 base works.*float32"),
        (
            ChangesBelow,
            r"Nothing changes below lowest_layer': what reaches layer 1 changes|changes a layer below lowest_layer",
        ),
        (
            ChangesEmbeddings,
            r"Nothing changes below lowest_layer': what reaches layer 0 changes|changes a layer below lowest_layer",
        ),
        (WritesInPlace, r"Split forward = plain forward.*return a new tensor from the edit"),
        (Forgets, r"Save and load round-trip.*something that matters is not in trainable\(\)"),
        (LoadsNothing, r"Save and load round-trip.*\['vector'\] differ after loading"),
        (SavesItself, r"Save and load round-trip.*overrides `save`, but a run writes"),
        (PerturbsForGood, r"A perturbed adapter comes back"),
        (NormWithoutAlpha, r"The effective norm is that of the update.*shifted by .* but the norm is"),
        (NormOfTheParameters, r"The effective norm is that of the update.*grows 4-fold, but the norm 2-fold"),
        (NormOfTheScale, r"The effective norm is that of the update.*depends on the scale"),
        (DeclaresAnotherShift, r"The update it declares is what it does': site 1 changes by"),
        (DeclaresAnotherProduct, r"The update it declares is what it does': site model\.layers\.1"),
    ],
)
def test_a_broken_adapter_is_caught(adapter, law) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){adapter.__name__} breaks the law '.*({law})"):
        check_adapter(adapter)


def test_an_adapter_that_its_arguments_do_not_rebuild_is_caught() -> None:
    def tuned():
        adapter = Shift()
        adapter.alpha = 3.0
        return adapter

    law = r"Shift breaks the law 'A checkpoint alone rebuilds it': the rebuilt adapter gives other logits"
    with pytest.raises(AssertionError, match=law):
        check_adapter(tuned)


def test_an_attached_adapter_is_refused() -> None:
    adapter = Shift()
    adapter.bind(make_tiny_model(), 0)
    with pytest.raises(ValueError, match="check_adapter needs an adapter that is not attached"):
        check_adapter(adapter)


class Count(Probe):
    """A good probe."""

    name = "count"
    quantities = (
        Quantity("ce_sum", "nats"),
        Quantity("ce", "nats_per_token"),
        Quantity("noise", "nats"),
    )

    def settings(self):
        return {}

    def measure(self, model, examples):
        total = sum(model.row_ce(batch).sums.sum().item() for batch in examples.narrow)
        return [Point("ce_sum", total, "nats")]


class Nan(Count):
    def measure(self, model, examples):
        return [Point("ce", float("nan"), "nats_per_token")]


class Silent(Count):
    def measure(self, model, examples):
        return []


class Undeclared(Count):
    quantities = (Quantity("ce", "nats_per_token"), Quantity("ce_sum", "nats", ("scale",)))


class OtherUnit(Count):
    quantities = (Quantity("ce_sum", "bits"),)


class OtherStream(Count):
    """Rows of a stream that a probe does not declare are not given to it."""

    reads = ("kl",)

    def measure(self, model, examples):
        assert not examples.narrow, "these rows are not declared"
        return [Point("ce_sum", float(len(examples.kl)), "nats")] if examples.kl else []


class NoSuchStream(Count):
    reads = ("narow",)


class NoSuchSetting(Count):
    grid = ("scales",)


class NoSuchCoordinate(Count):
    quantities = (Quantity("ce_sum", "nats", mean_over=("draw",)),)


class SecretGradient(Count):
    def measure(self, model, examples):
        with torch.enable_grad():
            return [Point("ce_sum", model.losses(examples.narrow[0], None).ce.total.item(), "nats")]


class SecretAnswers(Count):
    def measure(self, model, examples):
        model.base.generate(examples.narrow[0].input_ids[None, :3], max_new_tokens=2, do_sample=False)
        return super().measure(model, examples)


class Tuples(Count):
    def settings(self):
        return {"grid": (1, 2)}


class Slash(Count):
    name = "a/b"


class HalfTheRows(Count):
    def measure(self, model, examples):
        return [Point("ce", 1.0, "nats_per_token", per_example=(1.0,))]


class GlobalNoise(Count):
    def measure(self, model, examples):
        return [Point("noise", torch.rand(()).item(), "nats")]


class PythonNoise(Count):
    def measure(self, model, examples):
        return [Point("noise", random.random(), "nats")]


class LeavesAHook(Count):
    def measure(self, model, examples):
        model.base.model.layers[0].register_forward_hook(lambda *_: None)
        return super().measure(model, examples)


class WritesIntoTheBaseProbe(Count):
    def measure(self, model, examples):
        model.base.lm_head.weight.add_(0.0)
        return super().measure(model, examples)


class WritesBehindTheBack(Count):
    """`.data` hides the write from the version counter; the contract compares the values."""

    calls = 0

    def measure(self, model, examples):
        WritesBehindTheBack.calls += 1
        points = super().measure(model, examples)
        if WritesBehindTheBack.calls > 5:
            model.base.lm_head.weight.data.add_(1.0)
        return points


@pytest.mark.parametrize(
    ("probe", "law"),
    [
        (
            Undeclared,
            r"measured .*\('ce_sum', 'nats', \[\]\), but declares \[\('ce_sum', 'nats', \['scale'\]\)\]: correct",
        ),
        (
            OtherUnit,
            r"measured .*\('ce_sum', 'nats', \[\]\), but declares \[\('ce_sum', 'bits', \[\]\)\]: correct",
        ),
        (NoSuchStream, r"reads names \['narow'\], expected some of \['kl', 'narrow'\]"),
        (NoSuchSetting, r"grid names \['scales'\], expected some of \[\]"),
        (NoSuchCoordinate, r"mean_over of ce_sum names \['draw'\], expected some of \[\]"),
        (SecretGradient, "it computes gradients: set needs_gradients"),
        (SecretAnswers, "it samples answers: set max_new_tokens"),
        (Nan, "Points are finite and ready for JSON': Out of range float"),
        (Silent, "Points are finite and ready for JSON': it found no point"),
        (Tuples, "Points are finite and ready for JSON': .*lists, not tuples"),
        (Slash, "Points are finite and ready for JSON': the name 'a/b' must do as a file name"),
        (HalfTheRows, "Points are finite and ready for JSON': per_example of ce is not one value a row"),
        (GlobalNoise, "The same model gives the same points"),
        (PythonNoise, "The same model gives the same points"),
        (LeavesAHook, "A probe leaves no trace': hooks changed"),
        (WritesIntoTheBaseProbe, "wrote into the frozen base"),
        (WritesBehindTheBack, "A probe leaves no trace': weights changed"),
    ],
)
def test_a_broken_probe_is_caught(probe, law) -> None:
    with pytest.raises(AssertionError, match=rf"{probe.__name__} breaks the law '.*{law}|{law}"):
        check_probe(probe())


def test_a_good_probe_passes_and_the_model_is_left_alone() -> None:
    from tests.probes.test_base import EXAMPLES
    from tests.samples import adapted

    model = adapted(Shift())
    model.train()
    before = model.adapter.vector.detach().clone()
    assert [point.quantity for point in check_probe(Count(), model, EXAMPLES)] == ["ce_sum"]
    assert torch.equal(before, model.adapter.vector)
    assert model.adapter.vector.grad is None
    assert model.training
    assert len(check_probe(Count())) == 1
    assert check_probe(OtherStream())[0].value == 1.0


def test_a_quantity_with_the_name_of_a_column_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"share has the coordinates \['role'\], which are columns of every table"
    ):
        Quantity("share", "share", ("role", "scale"))
