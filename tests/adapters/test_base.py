"""What every adapter inherits: places, scale, noise, files."""

import json

import pytest
import torch
from torch import nn

from lightning_em.adapters import Adapter, LoRA, SteeringVector, decoder_layers, final_norm
from lightning_em.adapters.base import orthogonal_noise
from lightning_em.models import AdaptedModel
from tests.samples import ADAPTERS, adapted, make_rows, pack
from tests.tiny import ARCHITECTURES, make_tiny_model


class Shifts(Adapter):
    """One vector for each of several layers, added on entry."""

    def __init__(self, *layers: int) -> None:
        super().__init__()
        self.layers = layers

    def attach(self, base):
        self.vectors = nn.Parameter(torch.zeros(len(self.layers), base.config.hidden_size))
        for row, layer in enumerate(self.layers):
            self.edit_input_of(layer, lambda h, row=row: h + (self.scale * self.vectors[row]).to(h))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_and_final_norm_are_found(architecture) -> None:
    base = make_tiny_model(architecture)
    assert len(decoder_layers(base)) == 3
    assert final_norm(base) is base.model.norm


@pytest.mark.parametrize(
    ("layer", "num_layers", "index"),
    [
        (0, 3, 0),
        (2, 3, 2),
        (0.0, 3, 0),
        (0.5, 3, 1),
        (0.99, 3, 2),
        (0.5, 4, 2),
        (0.58, 50, 29),
        (0.29, 100, 29),
    ],
)
def test_layer_as_index_or_fraction_of_depth(layer, num_layers, index, monkeypatch) -> None:
    base = make_tiny_model()
    monkeypatch.setattr("lightning_em.adapters.base.decoder_layers", lambda _: [None] * num_layers)
    assert SteeringVector(0).resolve(base, layer) == index


@pytest.mark.parametrize("layer", [3, -1, 1.0, -0.1, 24])
def test_a_layer_that_does_not_exist_is_refused(layer) -> None:
    message = rf"layer must be 0\.\.2 or a fraction of depth in \[0, 1\), got {layer} for a model of 3 layers"
    with pytest.raises(ValueError, match=message):
        AdaptedModel(make_tiny_model(), SteeringVector(layer))


@pytest.mark.parametrize("layers", [(0, 2), (2, 0), (2, 3, 1)])
def test_lowest_layer_is_the_lowest_of_all_edits(layers) -> None:
    adapter = Shifts(*layers)
    AdaptedModel(make_tiny_model(), adapter)
    assert adapter.lowest_layer == min(layers)


@pytest.mark.parametrize(
    ("name", "lowest"), [("vector", 2), ("last_vector", 3), ("rank_1", 1), ("all_linear", 0)]
)
def test_lowest_layer_of_each_adapter(name, lowest) -> None:
    assert adapted(ADAPTERS[name]()).adapter.lowest_layer == lowest


def test_an_adapter_is_attached_once() -> None:
    adapter = SteeringVector(1)
    AdaptedModel(make_tiny_model(), adapter)
    with pytest.raises(ValueError, match="this SteeringVector is bound to a model already"):
        AdaptedModel(make_tiny_model(), adapter)


class Lazy(Adapter):
    def attach(self, base):
        self.weight = nn.Parameter(torch.zeros(3))


class Half(Adapter):
    def attach(self, base):
        self.resolve(base, 0)
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))


class Empty(Adapter):
    def attach(self, base):
        self.resolve(base, 0)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Lazy, r"Lazy\.attach must set lowest_layer, or call resolve\(\)"),
        (Half, r"trainable float32 parameters, got \{'weight': torch\.bfloat16\}"),
        (Empty, r"trainable float32 parameters, got none"),
    ],
)
def test_an_attach_that_breaks_the_contract_is_refused(adapter, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptedModel(make_tiny_model(), adapter())


@pytest.mark.parametrize("name", ADAPTERS)
def test_attaching_draws_from_its_own_generator(name) -> None:
    bases = [make_tiny_model() for _ in range(3)]
    before = torch.get_rng_state()
    models = [AdaptedModel(base, ADAPTERS[name](), seed) for base, seed in zip(bases, (3, 3, 4), strict=True)]
    assert torch.equal(before, torch.get_rng_state())
    one, two, other = (model.adapter.trainable() for model in models)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert all(torch.equal(value, other[key]) == ("lora_A" not in key) for key, value in one.items())


def test_scale_comes_back_after_an_error() -> None:
    model, batch = adapted(ADAPTERS["rank_1"]()), pack(make_rows(7))
    trained = model.logits(batch)
    try:
        with model.adapter.at_scale(0.3):
            assert model.adapter.scale == 0.3
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert model.adapter.scale == 1.0
    assert torch.equal(model.base(batch.input_ids[None]).logits[0], trained)


class Drawn(Adapter):
    """As a user writes it: values from the named generator, on no device in particular."""

    def attach(self, base):
        self.vector = nn.Parameter(torch.randn(base.config.hidden_size, generator=self.generator))
        self.edit_input_of(1, lambda hidden: hidden + (self.scale * self.vector).to(hidden))


@pytest.mark.parametrize("make", [*ADAPTERS.values(), Drawn])
def test_an_adapter_goes_where_its_base_is(make) -> None:
    adapter = make()
    adapter.bind(make_tiny_model().to("meta"), 0)
    assert {parameter.device.type for parameter in adapter.trainable().values()} == {"meta"}


@pytest.mark.parametrize("make", [*ADAPTERS.values(), Drawn])
def test_an_adapter_begins_alike_whatever_the_default_device(make) -> None:
    """Lightning asks for the GPU while the model is made; `meta` refuses a CPU's generator as a GPU does."""
    expected = AdaptedModel(make_tiny_model(), make()).adapter.trainable()
    base, adapter = make_tiny_model(), make()
    with torch.device("meta"):
        adapter.bind(base, 0)
    for name, parameter in adapter.trainable().items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("shape", [(5,), (7, 3), (1, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_orthogonal_and_of_equal_norm(shape, seed) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))
    y = orthogonal_noise(x, torch.Generator().manual_seed(seed))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert abs((x.double() * y.double()).sum()) <= 1e-6 * x.double().square().sum()
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-6, atol=0)
    exact = orthogonal_noise(x.double(), torch.Generator().manual_seed(seed))
    assert abs((x.double() * exact).sum()) <= 1e-14 * x.double().square().sum()


def test_noise_of_nothing_and_of_one_number_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    assert orthogonal_noise(torch.zeros(4), generator).eq(0).all()
    assert orthogonal_noise(torch.tensor([1e9]), generator).eq(0).all()


@pytest.mark.parametrize("name", ["vector", "rank_1", "rank_32"])
@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_perturbed_is_a_rotation_of_every_tensor(name, strength) -> None:
    """Norm kept, and e is the sine of the angle."""
    adapter = adapted(ADAPTERS[name]()).adapter
    before = {key: p.detach().clone() for key, p in adapter.trainable().items()}
    with adapter.perturbed(strength, torch.Generator().manual_seed(0)):
        for key, parameter in adapter.trainable().items():
            x, moved = before[key].double().flatten(), parameter.detach().double().flatten()
            torch.testing.assert_close(moved.norm(), x.norm(), rtol=1e-6, atol=0)
            cosine = (x @ moved) / x.norm() ** 2
            assert cosine.item() == pytest.approx((1 - strength**2) ** 0.5, abs=1e-6)
    assert all(torch.equal(before[key], p) for key, p in adapter.trainable().items())


def test_the_noise_does_not_depend_on_the_strength() -> None:
    adapter = adapted(ADAPTERS["rank_1"]()).adapter
    before = {key: p.detach().double() for key, p in adapter.trainable().items()}
    directions = []
    for strength in (0.2, 0.9):
        with adapter.perturbed(strength, torch.Generator().manual_seed(5)):
            moved = {k: p.detach().double() for k, p in adapter.trainable().items()}
        kept = (1 - strength**2) ** 0.5
        directions.append({key: (moved[key] - kept * before[key]) / strength for key in before})
    for key in before:
        torch.testing.assert_close(directions[0][key], directions[1][key], rtol=1e-4, atol=1e-5)


def test_strength_zero_changes_no_bit() -> None:
    adapter = adapted(SteeringVector(1)).adapter
    adapter.vector.data[0] = -0.0
    bits = adapter.vector.detach().view(torch.int32).clone()
    with adapter.perturbed(0.0, torch.Generator().manual_seed(0)):
        assert torch.equal(bits, adapter.vector.detach().view(torch.int32))
    assert torch.equal(bits, adapter.vector.detach().view(torch.int32))


def test_a_strength_above_one_is_refused() -> None:
    adapter = adapted(SteeringVector(1)).adapter
    with (
        pytest.raises(ValueError, match=r"strength must be between 0 and 1, got 1\.5"),
        adapter.perturbed(1.5, torch.Generator()),
    ):
        pass


@pytest.mark.parametrize("name", ADAPTERS)
def test_save_and_load_round_trip(name, tmp_path) -> None:
    written, read = adapted(ADAPTERS[name]()), adapted(ADAPTERS[name](), size=0.0, seed=7)
    written.adapter.save(tmp_path)
    read.adapter.load(tmp_path)
    batch = pack(make_rows(7, 11))
    assert torch.equal(written.logits(batch), read.logits(batch))
    assert json.loads((tmp_path / "adapter_config.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_another_adapter_is_not_loaded(tmp_path) -> None:
    adapted(ADAPTERS["rank_1"]()).adapter.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not hold this adapter\. Missing: \['vector'\]; unexpected: .*lora_A"
    ):
        adapted(SteeringVector(1)).adapter.load(tmp_path)
    with pytest.raises(ValueError, match=r"lora_A\.weight: \(1, 48\) instead of \(2, 48\)"):
        adapted(LoRA(2, 16.0, ["down_proj"], [0.5])).adapter.load(tmp_path)
