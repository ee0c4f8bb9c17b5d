"""Cross-entropy and KL computed from hidden states, for an output head that is never trained.

Logits are computed for one chunk of tokens at a time, in float32 for every model dtype (float64 stays float64). The
gradient with respect to the hidden states is computed from the same chunk in the forward pass. The backward pass only
scales it, and no gradient with respect to the head's weight is computed. With a vocabulary of 150,000 the logits of
one row of 400 tokens take 240 MB; autograd would keep several tensors of that size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Target size of one chunk of logits."""

_MIN_ROWS = 128  # with fewer rows in a chunk, reading the weight dominates the matrix product
_CACHE_BYTES = 2**19  # L2 cache of one CPU core
_VOCAB_BLOCK = 16384  # rows of the weight that are cast at once, to avoid a float32 copy of the whole weight
_WIDE = 60.0  # above this d, p * (exp(d) - 1) can lose probability mass where p underflows to 0


@dataclass(frozen=True)
class FrozenHead:
    """The map from final hidden states to logits: soft_cap * tanh(logit_scale * (W h + b) / soft_cap).

    Attributes:
        weight: `[vocab hidden]`; constant, also when it is tied to the embedding.
        bias: `[vocab]`, or None.
        logit_scale: Factor on the logits; 1 / `logits_scaling` for Granite.
        soft_cap: Bound on the logits (Gemma2), or None.
        chunk_bytes: Target size of one chunk of logits; depends on the device if not given.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    chunk_bytes: int | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the logits: float32, or float64 for a float64 head."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def logits(
        self, hidden: Float[Tensor, "tokens hidden"], out: Tensor | None = None
    ) -> Float[Tensor, "tokens vocab"]:
        """Compute logits in `compute_dtype`, without a gradient.

        Args:
            hidden: Final hidden states, in any dtype.
            out: Tensor that receives the logits, `[tokens vocab]`; allocated if not given.
        """
        hidden = hidden.detach()
        if out is None:
            out = hidden.new_empty((hidden.shape[0], self.weight.shape[0]), dtype=self.compute_dtype)
        self._matmul(hidden, out)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        if self.logit_scale != 1.0:
            out *= self.logit_scale
        if self.soft_cap is not None:
            out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return out

    def gradient_for_hidden(self, gradient: Tensor, logits: Tensor | None) -> Float[Tensor, "tokens hidden"]:
        """Backpropagate a gradient from the logits to the hidden states, in `compute_dtype`.

        Args:
            gradient: Gradient with respect to the logits; may be overwritten.
            logits: The logits; needed only with a soft cap.
        """
        if self.soft_cap is not None:
            assert logits is not None
            # d/dx cap * tanh(x / cap) = 1 - tanh(x / cap)^2, and tanh(x / cap) = logit / cap
            gradient *= 1 - (logits / self.soft_cap) ** 2
        if self.logit_scale != 1.0:
            gradient *= self.logit_scale
        if self.weight.dtype == gradient.dtype:
            return gradient @ self.weight
        if _tensor_cores(self.weight):
            # bfloat16 inputs; the products are accumulated and returned in float32
            return torch.mm(gradient.to(self.weight.dtype), self.weight, out_dtype=gradient.dtype)
        result = gradient.new_zeros((gradient.shape[0], self.weight.shape[1]))
        for block in self._vocab_blocks():
            result.addmm_(gradient[:, block], self.weight[block].to(gradient.dtype))
        return result

    def _matmul(self, hidden: Tensor, out: Tensor) -> None:
        if self.weight.dtype == out.dtype:
            torch.mm(hidden.to(out.dtype), self.weight.T, out=out)
        elif _tensor_cores(self.weight):
            torch.mm(hidden.to(self.weight.dtype), self.weight.T, out_dtype=out.dtype, out=out)
        else:
            wide = hidden.to(out.dtype)
            for block in self._vocab_blocks():
                out[:, block] = wide @ self.weight[block].to(out.dtype).T

    def _vocab_blocks(self) -> Iterator[slice]:
        for start in range(0, self.weight.shape[0], _VOCAB_BLOCK):
            yield slice(start, start + _VOCAB_BLOCK)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Divide the tokens into chunks of nearly equal size; their number depends only on head and `num_tokens`."""
        chunk_bytes = self.chunk_bytes or CHUNK_BYTES["cuda" if self.weight.is_cuda else "cpu"]
        rows = chunk_bytes // (self.weight.shape[0] * self.compute_dtype.itemsize)
        num_chunks = -(-num_tokens // max(rows, 2 if self.chunk_bytes else _MIN_ROWS))
        # At least two rows in each chunk: a single row uses a matrix-vector kernel, which rounds differently.
        num_chunks = min(num_chunks, max(1, num_tokens // 2))
        for index in range(num_chunks):
            yield slice(index * num_tokens // num_chunks, (index + 1) * num_tokens // num_chunks)


def _tensor_cores(weight: Tensor) -> bool:
    # float16 lacks the range for the gradient of a small KL, so float16 heads compute their products in float32
    return weight.is_cuda and weight.dtype == torch.bfloat16


def frozen_head(base: PreTrainedModel) -> FrozenHead:
    """Return the output head of a model, with the scaling and the soft cap that its config sets.

    Raises:
        ValueError: If the head is not a plain linear module, or has hooks.
    """
    head: Any = base.get_output_embeddings()
    # FrozenHead reads only weight and bias. Without this check, the code of a subclass (quantized, wrapped by peft) or
    # of a hook would be skipped in silence.
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        raise ValueError("the output head is not a plain linear module")
    config = base.config.get_text_config(decoder=True)
    bias: Tensor | None = head.bias
    # Granite divides its logits and Gemma2 caps them. Both models do so in their forward pass after the head module.
    scaling: float = getattr(config, "logits_scaling", None) or 1.0
    return FrozenHead(
        weight=_whole(head.weight.detach()),
        bias=None if bias is None else _whole(bias.detach()),
        logit_scale=1.0 / scaling,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _whole(weight: Tensor) -> Tensor:
    """Gather a sharded (FSDP2) weight; return any other weight unchanged."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def unfused_logits(
    head: FrozenHead, hidden: Float[Tensor, "counted hidden"]
) -> Float[Tensor, "counted vocab"]:
    """Compute all logits at once, with autograd, in the head's own dtype; used with `fused` off."""
    logits = functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.soft_cap is None else (logits / head.soft_cap).tanh() * head.soft_cap


def head_cross_entropy(
    head: FrozenHead, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Compute the cross-entropy of each target token, in nats, from the hidden state that predicts it."""
    values: Tensor = _HeadLoss.apply(hidden, None, targets, head)  # type: ignore[no-untyped-call]
    return values


def head_kl(
    head: FrozenHead,
    reference_hidden: Float[Tensor, "tokens hidden"],
    tuned_hidden: Float[Tensor, "tokens hidden"],
) -> Float[Tensor, "tokens"]:
    """Compute D_KL(reference || tuned) at each position over the whole vocabulary, in nats.

    Let p be the reference distribution, and d the difference of the logits (tuned - reference) minus its mean under p.
    Then the KL is log(1 + sum p (e^d - 1)). No large numbers cancel, so a small KL keeps its significant digits.

    Args:
        head: Output head of both models.
        reference_hidden: Final hidden states with the adapter at scale 0; treated as a constant.
        tuned_hidden: Final hidden states with the adapter at its current scale.

    Source: arXiv:2602.07852 (KL term; forward direction, temperature 1).
    """
    values: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        tuned_hidden, reference_hidden.detach(), None, head
    )
    return values


class _HeadLoss(torch.autograd.Function):
    """Per-token losses whose gradient with respect to the hidden states is computed in the forward pass.

    The loss of a token depends only on that token's hidden state. So the gradient of any weighted sum of the losses is
    the stored gradient of each row times the upstream value of that token.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, reference: Tensor | None, targets: Tensor | None, head: FrozenHead
    ) -> Tensor:
        num_tokens = hidden.shape[0]
        values = hidden.new_empty(num_tokens, dtype=head.compute_dtype)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        buffers: dict[str, Tensor] = {}
        for part in head.chunks(num_tokens):
            if reference is not None:
                chunk = _kl_chunk(head, hidden[part], reference[part], wanted, buffers)
            else:
                assert targets is not None
                chunk = _cross_entropy_chunk(head, hidden[part], targets[part], wanted, buffers)
            values[part], part_gradient = chunk
            if gradient is not None and part_gradient is not None:
                gradient[part] = part_gradient
        ctx.gradient = gradient
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        (upstream,) = grad_outputs
        gradient: Tensor = ctx.gradient
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def refuse_second_derivative() -> None:
    """Raise an error if the backward pass of a function with a precomputed gradient is to be differentiated.

    torch's `once_differentiable` raises only if the upstream gradient itself requires a gradient. The upstream gradient
    of a plain sum is a constant, so the second derivative would be 0 without an error.

    Raises:
        ValueError: If grad mode is on in the backward pass, as with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "the fast backend makes its gradients in the forward pass, so they have none themselves: for second "
            "derivatives (create_graph) set model.backend: plain."
        )


def _buffer(buffers: dict[str, Tensor], name: str, hidden: Tensor, head: FrozenHead) -> Tensor:
    """Return a reusable buffer for one chunk of logits; new memory pages cost as much time as the arithmetic."""
    rows = hidden.shape[0]
    if name not in buffers or buffers[name].shape[0] < rows:
        # one extra row, because chunk sizes differ by one
        buffers[name] = hidden.new_empty((rows + 1, head.weight.shape[0]), dtype=head.compute_dtype)
    return buffers[name][:rows]


def _cross_entropy_chunk(
    head: FrozenHead, hidden: Tensor, targets: Tensor, wanted: bool, buffers: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    # CE = log sum exp(z) - z_target, computed after subtracting max(z). The gradient dCE/dz is softmax(z) - onehot.
    logits = head.logits(hidden, _buffer(buffers, "logits", hidden, head))
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    # the derivative of the soft cap needs the logits; the loop below overwrites them
    kept = logits.clone() if wanted and head.soft_cap is not None else None
    tops, totals = [], []
    for rows in _cached_rows(logits):
        block = logits[rows]
        tops.append(block.amax(1))
        totals.append(block.sub_(tops[-1][:, None]).exp_().sum(1))
    top, total = torch.cat(tops), torch.cat(totals)
    values = top + total.log() - target_logits
    if not wanted:
        return values, None
    # At this point `logits` holds exp(z - top), so this computes total * (softmax(z) - onehot). The division by `total`
    # comes after the product with the weight, on [tokens hidden] instead of [tokens vocab].
    logits[torch.arange(len(targets), device=targets.device), targets] -= total
    return values, head.gradient_for_hidden(logits, kept) / total[:, None]


def _kl_chunk(
    head: FrozenHead, hidden: Tensor, reference: Tensor, wanted: bool, buffers: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    # Let p = softmax(reference logits), z = tuned logits - reference logits, and d = z - E_p[z]. Then
    #   KL = log E_p[exp(z)] - E_p[z] = log(1 + excess), with excess = E_p[exp(d) - 1] >= 0 (Jensen).
    # The usual formula, sum of p (log p - log q), subtracts numbers of order 10 to get a KL of 1e-4.
    reference_logits = head.logits(reference, _buffer(buffers, "other", hidden, head))
    logits = head.logits(hidden, _buffer(buffers, "logits", hidden, head))
    kept = logits.clone() if wanted and head.soft_cap is not None else None
    parts, totals = [], []
    for rows in _cached_rows(logits):
        # `shift` is z and later d; it overwrites the logits. `room` overwrites the reference logits after softmax.
        shift, room = logits[rows].sub_(reference_logits[rows]), reference_logits[rows]
        p = functional.softmax(room, dim=1)
        # On a CPU, torch 2.13 accumulates the denominator of a float32 softmax in a few lanes. Over 49,000 entries p
        # sums to 1 + 2e-5; without the division, that error times E_p[z] would be an error of the KL.
        totals.append(p.sum(1, keepdim=True))
        shift -= torch.mul(p, shift, out=room).sum(1, keepdim=True).div_(totals[-1])
        if bool(shift.amax() > _WIDE):
            return _kl_chunk_wide(head, hidden, reference, wanted)
        weighted = shift.exp_().sub_(1).mul_(p)
        parts.append(weighted.sum(1, keepdim=True).div_(totals[-1]).clamp_min_(0))
        if wanted:
            # dKL/dz = q - p with q = p exp(d) / (1 + excess), so q - p = (p (exp(d) - 1) - p excess) / (1 + excess).
            # The divisions by 1 + excess and by the total come after the product with the weight.
            weighted.addcmul_(p, parts[-1], value=-1)
    excess = torch.cat(parts)
    if not wanted:
        return excess[:, 0].log1p(), None
    gradient = head.gradient_for_hidden(logits, kept) / ((1 + excess) * torch.cat(totals))
    return excess[:, 0].log1p(), gradient


def _cached_rows(logits: Tensor) -> Iterator[slice]:
    """Divide rows into groups that fit in a CPU core's cache for several elementwise passes; one group on a GPU."""
    num_rows = logits.shape[0]
    step = num_rows if logits.is_cuda else max(1, _CACHE_BYTES // (logits.shape[1] * logits.itemsize))
    for start in range(0, num_rows, max(step, 1)):
        yield slice(start, start + step)


def _kl_chunk_wide(
    head: FrozenHead, hidden: Tensor, reference: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the KL by the textbook formula, for logits that differ too much for exp(difference) to be accurate."""
    logits = head.logits(hidden)
    log_p, log_q = (
        functional.log_softmax(head.logits(reference), dim=1),
        functional.log_softmax(logits, dim=1),
    )
    p = log_p.exp()
    values = (p * (log_p - log_q)).sum(1)
    return values, head.gradient_for_hidden(log_q.exp() - p, logits) if wanted else None
