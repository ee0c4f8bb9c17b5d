"""Where the fast path, or packed rows, would be wrong, and why."""

import logging
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedModel

from lightning_em.models.engine import EngineOptions
from lightning_em.models.split import FAST_ARCHITECTURES, frozen_head

logger = logging.getLogger(__name__)


def why_plain(base: PreTrainedModel) -> str | None:
    """Why the fast path does not apply to a model; None if it does."""
    config = base.config
    if config.model_type not in FAST_ARCHITECTURES:
        return f"model type {config.model_type} is not on the verified list"
    if not (code := type(base).__module__).startswith("transformers.models."):
        return f"the model's code is not that of transformers but of {code}"
    if getattr(config, "use_bidirectional_attention", False):
        return "the model's attention is bidirectional"
    for kind in sorted(_rope_types(config.to_dict()) & {"dynamic", "longrope"}):
        # shared prefixes and parts of batches would be other batches
        return f"its rotary embedding ({kind}) depends on the longest row of a batch"
    try:
        frozen_head(base)
    except ValueError as error:
        return str(error)
    return None


def _rope_types(config: object) -> set[str]:
    """Every `rope_type` in a config, however nested."""
    if not isinstance(config, dict):
        return set()
    own = {str(config[key]) for key in ("rope_type", "type") if isinstance(config.get(key), str)}
    return own.union(*(_rope_types(value) for value in config.values()))


def why_padded(base: PreTrainedModel) -> str | None:
    """Why a model is to keep the attention it came with; None if rows may be packed."""
    if base.config._attn_implementation == "eager" and base._supports_sdpa:  # Gemma2 has no other
        return "the model's attention is set to eager"
    return None


def chosen_options(
    base: PreTrainedModel, engine: Literal["auto", "plain"] | EngineOptions
) -> EngineOptions | None:
    """Parts of the fast path to use; None, with one logged line that says why, for the plain path."""
    if engine == "plain":
        logger.info("plain path: full forward passes and full logits, as asked for")
        return None
    reason = why_plain(base)
    if reason is not None:
        logger.warning("plain path (several times slower): %s", reason)
        return None
    options = engine if isinstance(engine, EngineOptions) else EngineOptions()
    reason = why_padded(base)
    if reason is None or not options.packed:
        return options
    logger.warning("padded rows instead of packed ones (slower): %s", reason)
    return replace(options, packed=False)
