"""Loading the frozen base model from the Hugging Face Hub, a local folder, or a source."""

import copy
import logging
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_em import sources
from lightning_em.data import ModelLimits

logger = logging.getLogger(__name__)

_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+$")
# Types whose attention sees later tokens, always or unless their config says `is_decoder`: tests/models/test_zoo.py
# changes a later token and compares.
_BIDIRECTIONAL = frozenset({"cpmant", "prophetnet", "xlm", "xlnet"})
_ENCODERS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
})  # fmt: skip
_TOKENS_PER_KNOWN = 4  # a tokenizer with less than 1/4 of the model's vocabulary does not belong to the model


@dataclass(frozen=True)
class BaseModel:
    """The pretrained base model.

    Attributes:
        path: Hub id, local folder, or an address such as `miniature://seed-0/model`; see `lightning_em.sources`.
        revision: Branch, tag or commit of a Hub model. Pin a commit to make a run reproducible.
        dtype: Data type of the frozen weights. The adapter is always float32.
        trust_remote_code: Whether to run Python code that comes with the model; requires `revision`.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.trust_remote_code and not self.revision:
            raise ValueError("trust_remote_code runs code from the hub: pin it with model.base.revision.")

    def load_model(self) -> PreTrainedModel:
        """Load the model in eval mode on the default device, with all parameters frozen.

        Raises:
            ValueError: If no causal language model can be loaded from `path`, or its weights are incomplete.
        """
        self.load_config()
        source = self._source()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                output_loading_info=True,
                revision=self.revision,
                dtype=getattr(torch, self.dtype),
                trust_remote_code=self.trust_remote_code,
                use_safetensors=True,  # never load a .bin file: it is a pickle and can run code
                local_files_only=self._without_network(source),
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(self._missing("model", error)) from error
        model: PreTrainedModel
        model, report = loaded
        own = {name for name, _ in model.named_parameters()}
        if missing := sorted(own & set(report["missing_keys"])):
            # transformers only warns, and gives them random values: those of a head, if another model was saved
            raise ValueError(
                f"the weights of {self.path!r} lack {', '.join(missing[:3])}{' and more' * (len(missing) > 3)} of "
                f"{type(model).__name__}: they are not those of a whole causal language model; set model.base.path."
            )
        model.eval()
        model.requires_grad_(False)
        return model

    def load_config(self) -> PreTrainedConfig:
        """Load only the model's config: its architecture and sizes, without weights.

        Raises:
            ValueError: If no config can be loaded from `path`, or it is not that of a causal language model.
        """
        source = self._source()
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                source,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self._without_network(source),
            )
        except OSError as error:
            raise ValueError(self._missing("model config", error)) from error
        self._refuse_other_class(config)
        return config

    def load_limits(self) -> ModelLimits:
        """Return which rows the model can read, by its config.

        Raises:
            ValueError: If no config can be loaded from `path`.
        """
        return ModelLimits(self.load_config())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer.

        Raises:
            ValueError: If no tokenizer can be loaded from `path`, or it has too few tokens for the model's vocabulary.
        """
        vocab_size = self.load_config().get_text_config(decoder=True).vocab_size
        source = self._source()
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self._without_network(source),
            )
        except OSError as error:
            raise ValueError(self._missing("tokenizer", error)) from error
        # Without tokenizer files, transformers returns an almost empty tokenizer of the class in the config.
        if len(tokenizer) * _TOKENS_PER_KNOWN < vocab_size:
            raise ValueError(
                f"the tokenizer of {self.path!r} knows {len(tokenizer)} tokens, but the model has {vocab_size}: its "
                "files (tokenizer.json, tokenizer.model, or vocab.json with merges.txt) are missing or not its own. "
                "Put them beside the weights, or set model.base.path to a folder or hub id that has them."
            )
        return tokenizer

    def _refuse_other_class(self, config: PreTrainedConfig) -> None:
        """Check that the config is that of a causal language model.

        Raises:
            ValueError: If transformers has no such model for it, or its attention sees later tokens.
        """
        if self.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            return  # code of its own, which nothing is known about
        saved_as = (getattr(config, "architectures", None) or [config.model_type])[0]
        reason = None
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            reason = f"transformers has no causal language model of type {config.model_type}"
        elif _OTHER_HEAD.search(saved_as):
            reason = "its head predicts something else than the next token"
        elif _sees_later_tokens(config):
            reason = "its attention sees later tokens"
        if reason is not None:
            raise ValueError(
                f"{self.path!r} holds a {saved_as}, which is not a causal language model ({reason}): set "
                "model.base.path to one, such as a chat model."
            )

    def _source(self) -> str:
        source = sources.resolve(self.path, "model.base.path")
        looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
        if looks_local and not Path(source).expanduser().is_dir():
            raise ValueError(
                f"there is no model folder {source} (looked from {Path.cwd()}); set model.base.path."
            )
        source = str(Path(source).expanduser()) if looks_local else source
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise ValueError(
                f"the folder {source} holds no model: it has no config.json; set model.base.path to a hub id or a "
                "folder with config.json, safetensors weights and tokenizer files."
            )
        return source

    def _without_network(self, source: str) -> bool:
        """Whether to use local files only, because the source is local or the Hub cannot be reached.

        Without this check, the Hub client makes six attempts for each file, of half a minute each.
        """
        if Path(source).is_dir() or os.environ.get("HF_HUB_OFFLINE", "").lower() in (
            "1",
            "true",
            "yes",
            "on",
        ):
            return True
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            with urllib.request.urlopen(endpoint, timeout=5):  # noqa: S310 (the user's own setting)
                return False
        except urllib.error.HTTPError:
            return False  # the server responds
        except OSError as error:
            logger.warning("%s cannot be reached (%s): using only what is on this machine.", endpoint, error)
            return True

    def _missing(self, what: str, error: Exception) -> str:
        first_line = str(error).strip().splitlines()[0]
        return (
            f"could not load a {what} from {self.path!r}: {first_line} Set model.base.path to a hub id or a "
            "folder with config.json, safetensors weights and tokenizer files."
        )


def with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules but not its weights, so that another adapter can be attached to the same weights.

    Args:
        model: Model without an adapter.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


def _sees_later_tokens(config: PreTrainedConfig) -> bool:
    if config.model_type in _BIDIRECTIONAL:
        return True
    if config.model_type in _ENCODERS:
        return not config.is_decoder
    # Gemma's embedding models; Gemma 4 has "vision" for images alone
    return getattr(config.get_text_config(decoder=True), "use_bidirectional_attention", None) in (True, "all")
