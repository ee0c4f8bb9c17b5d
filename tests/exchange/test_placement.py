"""Where a bias is a shift of the stream, against the whole model run in both ways."""

import pytest
import torch

from lightning_em.adapters import SteeringVector, decoder_layers
from lightning_em.exchange.placement import stream_site
from tests.exchange.made import HIDDEN, make_phi, words
from tests.models.architectures import QUIRKS, build
from tests.oracle import entirely_float64

BIASED = {"qwen2", "qwen2_window", "qwen3", "llama", "mistral", "phi", "phi3", "smollm3", "gpt_neox"}
NOT_BIASED = {"gemma2", "gemma3", "olmo2", "granite"}
INNER = {"gpt_neox": "mlp.dense_4h_to_h", "phi": "mlp.fc2"}


def test_every_architecture_is_on_one_list() -> None:
    assert not BIASED & NOT_BIASED
    assert set(QUIRKS) | {"phi"} == BIASED | NOT_BIASED


def make(architecture: str):
    with torch.random.fork_rng(devices=[]):
        return entirely_float64((make_phi() if architecture == "phi" else build(architecture)).double())


def is_a_shift(architecture: str, layer: int) -> bool:
    """Whether logits with the bias equal those with the adapter, in float64."""
    inner = INNER.get(architecture, "mlp.down_proj")
    shift = 0.7 * torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = words() % 60 + 3
    with torch.no_grad():
        biased = make(architecture)
        site = decoder_layers(biased)[layer].get_submodule(inner)
        site.register_forward_hook(lambda _module, _args, output: output + shift)
        steered, adapter = make(architecture), SteeringVector(layer, 1.0)
        adapter.bind(steered, 0)
        adapter.vector.data = shift
        moved = biased(input_ids=ids).logits
        assert not torch.allclose(moved, make(architecture)(input_ids=ids).logits, atol=1e-3)
        return torch.allclose(moved, steered(input_ids=ids).logits, atol=1e-9)


@pytest.mark.parametrize("architecture", sorted(BIASED))
def test_the_output_of_the_mlp_joins_the_stream_as_it_is(architecture) -> None:
    config = make(architecture).config
    for layer in (0, 3):
        assert stream_site(config, layer).endswith(
            f"layers.{layer}.{INNER.get(architecture, 'mlp.down_proj')}"
        )
        assert is_a_shift(architecture, layer)


@pytest.mark.parametrize("architecture", sorted(NOT_BIASED))
def test_where_something_follows_the_mlp_it_is_refused(architecture) -> None:
    with pytest.raises(ValueError, match=r"something .a norm, or a multiplier. follows mlp.down_proj"):
        stream_site(make(architecture).config, 1)
    assert not is_a_shift(architecture, 1)


def test_an_unknown_block_is_refused() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has none of mlp.down_proj"):
        stream_site(config, 1)


def test_the_check_leaves_random_numbers_alone() -> None:
    config = build("qwen2").config
    before = torch.get_rng_state()
    stream_site(config, 1)
    assert torch.equal(torch.get_rng_state(), before)
