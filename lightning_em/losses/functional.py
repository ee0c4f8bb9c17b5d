"""The plain losses from full logits: the oracle that everything faster is checked against."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class TokenSum(NamedTuple):
    """A sum over counted tokens; the caller divides once, after adding up all micro-batches and ranks.

    Attributes:
        total: Sum in nats, a scalar.
        count: How many tokens were added.
    """

    total: Tensor
    count: int  # type: ignore[assignment]  # shadows tuple.count


def _float_logits(logits: Tensor) -> Tensor:
    # bf16 log_softmax makes a small KL mostly noise; float64 stays float64
    return logits if logits.dtype == torch.float64 else logits.float()


def token_cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Cross-entropy of each target token, in nats."""
    return functional.cross_entropy(_float_logits(logits), targets, reduction="none")


def token_kl(
    reference_logits: Float[Tensor, "tokens vocab"], tuned_logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, "tokens"]:
    """D_KL(reference || tuned) at each position over the whole vocabulary, in nats.

    The reference is a constant: no gradient reaches it.

    Source: arXiv:2602.07852 (KL term; forward direction, temperature 1).
    """
    reference = functional.log_softmax(_float_logits(reference_logits.detach()), dim=-1)
    tuned = functional.log_softmax(_float_logits(tuned_logits), dim=-1)
    # torch's kl_div(input, target) is D_KL(target || input), both as log-probabilities here
    return functional.kl_div(tuned, reference, log_target=True, reduction="none").sum(-1)


def cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens"], mask: Bool[Tensor, "tokens"]
) -> TokenSum:
    """Sum the cross-entropy over the masked positions.

    Args:
        logits: Logits of the model.
        targets: The token that follows each position.
        mask: True where a position counts.

    Returns:
        Total in nats and the count. A mask without a True gives 0 and 0 and stays part of the graph: a
        rank without rows in the short last window has such a batch.
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
        Total in nats and the count; 0 and 0 if the mask has no True.

    Source: arXiv:2602.07852 (KL term).
    """
    return TokenSum(token_kl(reference_logits[mask], tuned_logits[mask]).sum(), int(mask.sum()))
