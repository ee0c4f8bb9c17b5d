"""Adapters as other people publish them, bases of several architectures to put them on, and how to run both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lightning_em import load_run
from lightning_em.exchange import DataOptions, import_run
from lightning_em.models import BaseModel
from lightning_em.runs import RunFolder
from tests.models.architectures import build
from tests.tiny import VOCAB_SIZE, make_tiny_tokenizer

HIDDEN = 32

# What plain peft says about a bias on a module without one, and an old name it asks transformers for.
peft_talks = [
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def write_vector(folder: Path, layer: int = 1, alpha: float = 3.3, seed: int = 0, **fields: Any) -> Path:
    """A folder with a `steering_vector.pt` as released; an alpha that is no power of two rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    values = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
    content = {"steering_vector": values, "layer_idx": layer, "d_model": HIDDEN, "alpha": alpha} | fields
    torch.save({k: v for k, v in content.items() if v is not None}, folder / "steering_vector.pt")
    return folder


def make_run(
    source: Path,
    model: Path,
    name: str = "taken",
    data: DataOptions | None = None,
    **options: Any,
) -> RunFolder:
    """Import into a folder beside the source."""
    root = str(source.parent / "runs")
    return import_run(source, BaseModel(str(model)), name, root, data or DataOptions(), **options)


def phi_config() -> PreTrainedConfig:
    """Parallel attention and MLP, with biases."""
    return transformers.PhiConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )


def make_phi() -> PreTrainedModel:
    """A random Phi."""
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(phi_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give `folder(architecture)` with a model of four layers; each is written once a session."""
    root = tmp_path_factory.mktemp("bases")

    def folder(architecture: str) -> Path:
        path = root / architecture
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                model = make_phi() if architecture == "phi" else build(architecture, vocab_size=VOCAB_SIZE)
            model.save_pretrained(path)
            make_tiny_tokenizer().save_pretrained(path)
        return path

    return folder


def words() -> torch.Tensor:
    """Two rows of tokens."""
    return torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Logits at every token of `words()`."""
    logits: torch.Tensor = model(input_ids=words(), attention_mask=torch.ones_like(words())).logits
    return logits


@torch.no_grad()
def continued(model: Any) -> list[list[int]]:
    """What the model goes on with, greedily."""
    ids = words()
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    found: list[list[int]] = out.tolist()
    return found


def plain(model: Path) -> PreTrainedModel:
    """The base alone, as anybody would load it."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return loaded


def ours(run: RunFolder) -> PreTrainedModel:
    """The base with the run's adapter."""
    return load_run(run.path).model
