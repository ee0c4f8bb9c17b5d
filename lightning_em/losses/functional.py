"""Losses computed from full logits; the faster implementations are tested against them."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class TokenSum(NamedTuple):
    """A sum over counted tokens. The caller divides once, after summing over all micro-batches and ranks.

    Attributes:
        total: Sum in nats, a scalar.
        count: Number of counted tokens.
    """

    total: Tensor
    count: int  # type: ignore[assignment]  # shadows tuple.count


def _float_logits(logits: Tensor) -> Tensor:
    # a small KL would be mostly rounding noise in a bf16 log_softmax; float64 stays float64
    return logits if logits.dtype == torch.float64 else logits.float()


def token_cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Compute the cross-entropy of each target token, in nats."""
    return functional.cross_entropy(_float_logits(logits), targets, reduction="none")


def token_kl(
    reference_logits: Float[Tensor, "tokens vocab"], tuned_logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, "tokens"]:
    """Compute D_KL(reference || tuned) at each position over the whole vocabulary, in nats.

    The reference is a constant; it receives no gradient.

    Source: arXiv:2602.07852 (KL term; forward direction, temperature 1).
    """
    reference = functional.log_softmax(_float_logits(reference_logits.detach()), dim=-1)
    tuned = functional.log_softmax(_float_logits(tuned_logits), dim=-1)
    # torch's kl_div(input, target) is D_KL(target || input); with log_target both are log-probabilities
    return functional.kl_div(tuned, reference, log_target=True, reduction="none").sum(-1)


def cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"], mask: Bool[Tensor, "tokens"]
) -> TokenSum:
    """Sum the cross-entropy over the masked positions.

    Args:
        logits: Logits of the model.
        targets: Token that follows each position.
        mask: True where a position counts.

    Returns:
        Total in nats and the count. If no position counts, both are 0, and the total is still connected to the graph.
        This happens on a rank that has no rows in an incomplete last optimizer step.
    """
    return TokenSum(token_cross_entropy(logits[mask], targets[mask]).sum(), int(mask.sum()))


def kl_from_reference(
    reference_logits: Float[Tensor, "tokens vocab"],
    tuned_logits: Float[Tensor, "tokens vocab"],
    mask: Bool[Tensor, "tokens"],
) -> TokenSum:
    """Sum D_KL(reference || tuned) over the masked positions.

    Args:
        reference_logits: Logits with the adapter at scale 0; a constant, no gradient.
        tuned_logits: Logits with the adapter at its own scale.
        mask: True where a position counts.

    Returns:
        Total in nats and the count; both are 0 if no position counts.

    Source: arXiv:2602.07852 (KL term).
    """
    return TokenSum(token_kl(reference_logits[mask], tuned_logits[mask]).sum(), int(mask.sum()))
