"""Selection of the backend: the fast one where it is verified, otherwise the plain one, with the reason logged."""

import logging
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedModel

from lightning_em.adapters import Adapter
from lightning_em.models.backend import Backend
from lightning_em.models.fast import ActivationStore, FastBackend, FastOptions
from lightning_em.models.fast.fused_head import frozen_head
from lightning_em.models.padding import LENGTH_DEPENDENT
from lightning_em.models.plain import PlainBackend

logger = logging.getLogger(__name__)

FAST_ARCHITECTURES = (
    *("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text"),
    *("phi3", "olmo2", "granite", "smollm3", "gpt_neox"),
)
"""Model types for which tests show that split and full passes are bit-identical, and packed and padded rows agree."""


def choose_backend(
    base: PreTrainedModel,
    adapter: Adapter,
    backend: Literal["auto", "plain"] | FastOptions,
    store: ActivationStore | None,
    reference: Literal["live", "cached"],
) -> Backend:
    """Create the backend of a model whose adapter is attached; see `AdaptedModel` for the arguments."""
    if reference == "cached" and store is None:
        raise ValueError("reference is cached, but there is no store; set model.store or reference: live.")
    reason = None if backend == "plain" else why_plain(base)
    if backend == "plain" or reason is not None:
        if reason is None:
            logger.info("plain backend: full forward passes and full logits, as asked for")
        else:
            logger.warning("plain backend (several times slower): %s", reason)
        if store is not None:
            logger.warning("the plain backend does not use the activation store, and the reference runs live")
        return PlainBackend(base, adapter)
    options = backend if isinstance(backend, FastOptions) else FastOptions()
    if options.packed and (reason := why_padded(base)) is not None:
        logger.warning("padded rows instead of packed ones (slower): %s", reason)
        options = replace(options, packed=False)
    fast = FastBackend(base, adapter, options, store, reference)
    logger.info("fast backend: split at layer %d of %d", *fast.hidden.split.place)
    return fast


def why_plain(base: PreTrainedModel) -> str | None:
    """Return the reason why the fast backend does not support a model; None if it does."""
    config = base.config
    if config.model_type not in FAST_ARCHITECTURES:
        return f"model type {config.model_type} is not on the verified list"
    # With `trust_remote_code`, a listed model type can have any code.
    if not (code := type(base).__module__).startswith("transformers.models."):
        return f"the model's code is not that of transformers but of {code}"
    if getattr(config, "use_bidirectional_attention", False):
        return "the model's attention is bidirectional"
    # For these two types, transformers 5.23 chooses the rotary frequencies by the largest position in the whole input.
    # A batch, its parts, and the shared pass over both streams would then use different frequencies.
    for kind in sorted(_rope_types(config.to_dict()) & set(LENGTH_DEPENDENT)):
        return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    try:
        frozen_head(base)
    except ValueError as error:
        return str(error)
    return None


def _rope_types(config: object) -> set[str]:
    """Return each `rope_type` in a config, at any depth: Gemma3 has one for each type of layer."""
    if not isinstance(config, dict):
        return set()
    own = {str(config[key]) for key in ("rope_type", "type") if isinstance(config.get(key), str)}
    return own.union(*(_rope_types(value) for value in config.values()))


def why_padded(base: PreTrainedModel) -> str | None:
    """Return the reason why a model must keep its own attention; None if rows may be packed."""
    # Gemma2 supports only eager attention, because of its soft cap. In other models the user chose eager attention, for
    # example to read attention weights.
    if base.config._attn_implementation == "eager" and base._supports_sdpa:
        return "the model's attention is set to eager"
    return None
