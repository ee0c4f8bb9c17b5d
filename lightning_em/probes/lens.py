"""Logit lens: the tokens whose logits an update's write direction raises or lowers."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_em.adapters import final_norm
from lightning_em.models import AdaptedModel
from lightning_em.probes.base import Probe, ProbeExamples
from lightning_em.probes.rows import tokenizer_of
from lightning_em.records import Point, Quantity

logger = logging.getLogger(__name__)


class LogitLens(Probe):
    """Tokens whose logits the adapter's write direction raises and lowers most, with their text.

    Each direction of `Adapter.write_directions` is scaled to length 1 and multiplied by the weight of the final
    norm and by the head, as if it were added to the residual stream just before them. The effect of the later
    layers, the norm's division and a cap on the logits are ignored. In a low-rank update, the input determines
    the sign and the strength of the direction, so promoted and demoted tokens may swap.

    Points: `logit_change` (unit logits), with coordinates `direction` (`promoted` or `demoted`), `rank` from 0,
    `token`, `token_id` and `site` (where the adapter writes). Adapters without such a direction are skipped
    with a message.

    Args:
        num_tokens: Number of promoted tokens, and of demoted tokens, per site.
        max_sites: Maximum number of sites to report; those with the largest updates are kept.

    Raises:
        ValueError: If a number is not positive.
    """

    name = "logit_lens"
    quantities = (
        Quantity(
            "logit_change", "logits", ("direction", "rank", "token", "token_id", "site"), in_study="none"
        ),
    )
    reads = ()

    def __init__(self, num_tokens: int = 20, max_sites: int = 4) -> None:
        if min(num_tokens, max_sites) < 1:
            raise ValueError(
                f"num_tokens and max_sites must be 1 or more, got {num_tokens} and {max_sites}; "
                "set init_args of LogitLens."
            )
        self.num_tokens, self.max_sites = num_tokens, max_sites

    def settings(self) -> Mapping[str, Any]:
        return {"num_tokens": self.num_tokens, "max_sites": self.max_sites}

    def measure(self, model: AdaptedModel, examples: ProbeExamples) -> list[Point]:
        directions = model.adapter.write_directions()
        if not directions:
            reason = "writes no direction into the residual stream"
            if directions is not None:
                reason = "has no update yet"
            message = "%s %s: %s has nothing to read off."
            rank_zero_only(logger.info)(message, type(model.adapter).__name__, reason, self.name)
            return []
        tokenizer = self._tokenizer(model)
        largest = sorted(directions, key=lambda site: -float(directions[site].norm()))[: self.max_sites]
        points = []
        for site in largest:
            with model.adapter.at_scale(0.0):  # the adapter may hook the final norm itself
                change = logit_change(model.base, directions[site] / directions[site].norm())
            if tokenizer is not None:
                change = change[: len(tokenizer)]  # the remaining rows of the head are padding
            points += self._extremes(change, site, tokenizer)
        return points

    def _tokenizer(self, model: AdaptedModel) -> PreTrainedTokenizerBase | None:
        try:
            return tokenizer_of(model)
        except ValueError as error:
            rank_zero_only(logger.info)("%s names tokens by number: %s", self.name, error)
            return None

    def _extremes(self, change: Tensor, site: str, tokenizer: PreTrainedTokenizerBase | None) -> list[Point]:
        points = []
        for direction, sign in (("promoted", 1), ("demoted", -1)):
            ids = (sign * change).argsort(descending=True, stable=True)[: self.num_tokens].tolist()
            for rank, token_id in enumerate(ids):
                token = f"#{token_id}" if tokenizer is None else str(tokenizer.decode([token_id]))
                place: dict[str, float | int | str] = {
                    "direction": direction,
                    "rank": rank,
                    "token": token,
                    "token_id": token_id,
                    "site": site,
                }
                points.append(Point("logit_change", float(change[token_id]), "logits", place))
        return points


@torch.no_grad()
def logit_change(base: PreTrainedModel, direction: Tensor) -> Tensor:
    """Compute the change of each logit for a direction added before the final norm, without the norm's division.

    Args:
        base: Base model with the final norm and the head.
        direction: Direction `[hidden]` in the residual stream.

    Returns:
        Changes `[vocab]`, float32 on the CPU.
    """
    head = base.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    weight = head.weight
    scaled = direction.to(weight.device).float() * _gain(final_norm(base)).to(weight.device)
    # in chunks: a float32 copy of a large head would take gigabytes
    parts = [rows.float() @ scaled for rows in torch.split(weight, 8192)]
    return torch.cat(parts).cpu()


def _gain(norm: nn.Module) -> Tensor:
    """Factor of each channel in the norm, float32; some classes store it as an offset from 1."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    if isinstance(norm, nn.LayerNorm):
        return weight.float()
    # the root mean square of a vector of ones is 1, so the output is the effective factor
    ones = torch.ones(weight.shape, dtype=torch.float32, device=weight.device)
    gain: Tensor = norm(ones)
    return gain.float()
