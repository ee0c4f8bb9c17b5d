"""The memory estimate against bytes that are really kept."""

import pytest
import torch

from lightning_em.adapters import LoRA, SteeringVector
from lightning_em.batch import EncodedRow, PackedBatch
from lightning_em.callbacks import Probing
from lightning_em.cluster.loads import probing_loads
from lightning_em.cluster.memory import Load, estimate, graph_bytes_per_token, on_meta
from lightning_em.models import AdaptedModel
from lightning_em.probes import ChatKL, GradientNorm, ScaleCurve
from tests.tiny import VOCAB_SIZE, make_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "head_dim": 16}
ADAPTERS = {
    "vector": lambda: SteeringVector(2),
    "lora": lambda: LoRA(8, 16.0, ["down_proj"], [3]),
    "all_layers": lambda: LoRA(4, 8.0, ["q_proj", "down_proj"]),
}


def bytes_kept_by_a_training_step(architecture: str, adapter, tokens: int) -> float:
    """Bytes a token of what autograd keeps in the backend's own packed pass over real weights, each storage once."""
    model = AdaptedModel(make_tiny_model(architecture, **SIZES), adapter)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (tokens,), generator=generator).tolist()
    batch = PackedBatch.from_rows([EncodedRow(ids, [True] * tokens, "row")])
    hidden = model.backend.hidden
    prefix = hidden.prefix(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden.final(batch, torch.ones(tokens, dtype=torch.bool), prefix)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2"])
def test_the_graph_is_as_large_as_in_a_real_pass(architecture, adapter) -> None:
    base = on_meta(make_tiny_model(architecture, **SIZES).config, "float32")
    attached = ADAPTERS[adapter]()
    attached.bind(base, 0)
    attached.to("meta")
    real = bytes_kept_by_a_training_step(architecture, ADAPTERS[adapter](), tokens=32)
    assert graph_bytes_per_token(base) == pytest.approx(real, rel=0.35)


def sized(adapter, shards: int = 1, part_tokens: int = 100, dtype: str = "float32", **sizes: int):
    model = make_tiny_model(**(SIZES | sizes))
    base = on_meta(model.config, dtype)
    adapter.bind(base, 0)
    adapter.to("meta")
    return model, estimate(base, adapter, Load(part_tokens, 300, shards, "cpu"))


def test_weights_and_optimiser_are_counted_exactly() -> None:
    model, found = sized(SteeringVector(2))
    assert found.base == sum(p.numel() * 4 for p in model.parameters())
    assert found.adapter == 64 * 4 * 4  # the vector, its gradient, and Adam's two moments, in float32
    _, half = sized(SteeringVector(2), dtype="bfloat16")
    assert half.base == found.base / 2
    assert half.adapter == found.adapter


def test_a_tied_head_is_counted_once() -> None:
    model, found = sized(SteeringVector(2), tie_word_embeddings=True)
    assert found.base == sum(p.numel() * 4 for p in model.parameters())


def test_shards_divide_the_blocks_and_nothing_else() -> None:
    model, whole = sized(SteeringVector(2))
    _, shared = sized(SteeringVector(2), shards=4)
    block = sum(p.numel() * 4 for p in model.get_decoder().layers[0].parameters())
    assert whole.base - shared.base == pytest.approx(6 * block * 3 / 4 - 2 * block)  # two blocks are gathered
    assert vars(shared) | {"base": 0} == vars(whole) | {"base": 0}


def test_activations_grow_with_the_part_and_with_the_layers_above_the_cut() -> None:
    _, one = sized(SteeringVector(2))
    assert sized(SteeringVector(2), part_tokens=200)[1].activations == pytest.approx(2 * one.activations)
    assert sized(SteeringVector(4))[1].activations < 0.6 * one.activations


def test_the_load_of_a_micro_batch() -> None:
    short = Load.of_rows([100, 90], [80, 80, 80], 1, "cuda")
    assert (short.part_tokens, short.batch_tokens) == (430, 430)  # both streams share a pass
    sharded = Load.of_rows([100, 90], [80, 80, 80], 2, "cuda")
    assert (sharded.part_tokens, sharded.batch_tokens) == (240, 430)  # the larger stream is one part
    long = Load.of_rows([1000, 900], [800], 1, "cuda")
    assert (long.part_tokens, long.batch_tokens) == (1900, 2700)
    assert (
        Load.of_rows([900, 800, 700], [80], 1, "cpu").part_tokens == 1024
    )  # cut into parts of at most so many
    assert Load.of_rows([3000], [80], 1, "cpu").part_tokens == 3000  # a row is never cut
    filled = Load.of_rows([100, 90], [80, 80, 80], 1, "cuda", max_tokens=16000)
    assert (filled.part_tokens, filled.batch_tokens) == (16000, 16000)  # batch sizes are then a ratio
    assert Load.of_rows([100], [80], 1, "cpu", max_tokens=16000).part_tokens == 1024


class SampledGradient(GradientNorm):
    """A probe of a user that samples answers; what it needs is read off its class, whatever its name."""

    needs_gradients = False
    max_new_tokens = 7
    batch_size = 2


def test_probes_ask_for_rows_of_their_own() -> None:
    training = Load.of_rows([10], [10], 2, "cpu")
    probes = [GradientNorm(), ScaleCurve(), ChatKL(batch_size=2, max_new_tokens=7)]
    streams = {"narrow": [30, 20, 10, 5], "kl": []}
    loads = probing_loads(Probing(probes, batch_size=3), streams, training)
    asked = [(load.part_tokens, load.batch_tokens, load.generated_tokens) for load in loads]
    assert asked == [(60, 60, 0), (0, 60, 0), (0, 50, 50 + 14), (0, 64, 0)]
    assert {load.shards for load in loads} == {2}
    assert probing_loads(Probing([SampledGradient()], batch_size=3), streams, training) == loads[2:]
    alone = probing_loads(Probing(probes[1:2], batch_size=3), streams, Load.of_rows([10], [10], 1, "cpu"))
    assert [load.batch_tokens for load in alone] == [65], "short batches share a pass"
    assert probing_loads(Probing(batch_size=3), streams, training) == []
    assert Load.of_rows([10], [], 1, "cpu").part_tokens == 10


def test_the_estimate_is_of_the_time_when_most_is_needed() -> None:
    model = make_tiny_model(**SIZES)
    base, adapter = on_meta(model.config, "float32"), SteeringVector(2)
    adapter.bind(base, 0)
    adapter.to("meta")
    small, large = Load(100, 300, device="cpu"), Load(400, 300, device="cpu")
    assert estimate(base, adapter, small, large) == estimate(base, adapter, large)
    assert estimate(base, adapter, large, small) == estimate(base, adapter, large)
    assert estimate(base, adapter, Load(0, 300, device="cpu")).activations == 0


def test_keys_and_values_are_those_of_a_real_cache() -> None:
    model = make_tiny_model(**SIZES)
    base, adapter = on_meta(model.config, "float32"), SteeringVector(2)
    adapter.bind(base, 0)
    adapter.to("meta")
    with torch.no_grad():
        cache = model(torch.zeros((2, 9), dtype=torch.long), use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    found = estimate(base, adapter, Load(0, 18, device="cpu", generated_tokens=18))
    assert found.caches == kept > 0
