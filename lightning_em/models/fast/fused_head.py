"""Cross-entropy and KL straight from hidden states, for an output head that is never trained.

The logits exist for one chunk of tokens at a time, in float32 whatever the model's dtype (float64 stays float64), and
the gradient for the hidden states is made while they exist. The backward pass only scales it, and no gradient for the
head's weight is ever computed. With a vocabulary of 150,000 the logits of one row of 400 tokens take 240 MB; autograd
would keep several tensors of that size.
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

_MIN_ROWS = 128  # fewer rows in a chunk leave the matrix product waiting for the weight
_CACHE_BYTES = 2**19  # of one core, second level
_VOCAB_BLOCK = (
    16384  # rows of the weight that are cast at a time, so that no float32 copy of all of it exists
)
_WIDE = 60.0  # above it p * exp(d) can miss mass where p underflows


@dataclass(frozen=True)
class FrozenHead:
    """The map from final hidden states to logits: soft_cap * tanh(logit_scale * (W h + b) / soft_cap).

    Attributes:
        weight: `[vocab hidden]`; constant, also when it is tied to the embedding.
        bias: `[vocab]`, or None.
        logit_scale: Factor on the logits; one over `logits_scaling` for Granite.
        soft_cap: Bound on the logits (Gemma2), or None.
        chunk_bytes: Target size of one chunk of logits; chosen by device if not given.
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
        """Logits in `compute_dtype`, without gradient.

        Args:
            hidden: Final hidden states, in any dtype.
            out: Where to write them, `[tokens vocab]`.
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
        """Gradient for the hidden states, in `compute_dtype`, from one for the logits.

        Args:
            gradient: Gradient for the logits; overwritten.
            logits: The logits; needed with a soft cap only.
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
            # products of bfloat16, accumulated and returned in float32
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
        """Parts of nearly equal size; their number depends on `num_tokens` alone."""
        chunk_bytes = self.chunk_bytes or CHUNK_BYTES["cuda" if self.weight.is_cuda else "cpu"]
        rows = chunk_bytes // (self.weight.shape[0] * self.compute_dtype.itemsize)
        num_chunks = -(-num_tokens // max(rows, 2 if self.chunk_bytes else _MIN_ROWS))
        # At least two rows each: one row is a product of matrix and vector, another kernel, which rounds otherwise.
        num_chunks = min(num_chunks, max(1, num_tokens // 2))
        for index in range(num_chunks):
            yield slice(index * num_tokens // num_chunks, (index + 1) * num_tokens // num_chunks)


def _tensor_cores(weight: Tensor) -> bool:
    # float16 lacks the range for the gradient of a small KL, so that its products are made in float32
    return weight.is_cuda and weight.dtype == torch.bfloat16


def frozen_head(base: PreTrainedModel) -> FrozenHead:
    """The output head of a model, with what its config does to the logits.

    Raises:
        ValueError: If the head is not a plain linear module, or has hooks.
    """
    head: Any = base.get_output_embeddings()
    # FrozenHead uses the weight alone: a subclass (quantised, wrapped by peft) or a hook would be skipped in silence.
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        raise ValueError("the output head is not a plain linear module")
    config = base.config.get_text_config(decoder=True)
    bias: Tensor | None = head.bias
    # Granite divides its logits, Gemma2 caps them; both after the head, in the model's own forward pass.
    scaling: float = getattr(config, "logits_scaling", None) or 1.0
    return FrozenHead(
        weight=_whole(head.weight.detach()),
        bias=None if bias is None else _whole(bias.detach()),
        logit_scale=1.0 / scaling,
        soft_cap=getattr(config, "final_logit_softcapping", None),
    )


def _whole(weight: Tensor) -> Tensor:
    """A sharded (FSDP2) weight gathered; an ordinary one as it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def unfused_logits(
    head: FrozenHead, hidden: Float[Tensor, "counted hidden"]
) -> Float[Tensor, "counted vocab"]:
    """Logits with their graph, in the head's own dtype, all at once: what the fused losses replace."""
    logits = functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.soft_cap is None else (logits / head.soft_cap).tanh() * head.soft_cap


def head_cross_entropy(
    head: FrozenHead, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, "tokens"]
) -> Float[Tensor, "tokens"]:
    """Cross-entropy of each target token, in nats, from the hidden state that predicts it."""
    values: Tensor = _HeadLoss.apply(hidden, None, targets, head)  # type: ignore[no-untyped-call]
    return values


def head_kl(
    head: FrozenHead,
    reference_hidden: Float[Tensor, "tokens hidden"],
    tuned_hidden: Float[Tensor, "tokens hidden"],
) -> Float[Tensor, "tokens"]:
    """D_KL(reference || tuned) at each position over the whole vocabulary, in nats.

    With p the reference and d the difference of the logits less its mean under p, this is
    log(1 + sum p (e^d - 1)): no two large numbers cancel, so a small KL keeps its digits.

    Args:
        head: The head of both models.
        reference_hidden: Final hidden states with the adapter at scale 0; a constant.
        tuned_hidden: Final hidden states with the adapter at its own scale.

    Source: arXiv:2602.07852 (KL term; forward direction, temperature 1).
    """
    values: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        tuned_hidden, reference_hidden.detach(), None, head
    )
    return values


class _HeadLoss(torch.autograd.Function):
    """Per-token losses whose gradient for the hidden states is made in the forward pass."""

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
    """Check, in the backward pass of a function with a ready-made gradient, that nothing differentiates it again.

    torch's `once_differentiable` raises only if the upstream gradient needs a gradient itself; that of a plain sum is
    a constant, and the second derivative would be a silent 0.

    Raises:
        ValueError: If the backward pass is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "the fast backend makes its gradients in the forward pass, so they have none themselves: for second "
            "derivatives (create_graph) set model.backend: plain."
        )


def _buffer(buffers: dict[str, Tensor], name: str, hidden: Tensor, head: FrozenHead) -> Tensor:
    """A buffer for one chunk of logits, allocated once: fresh pages cost as much as the arithmetic on them."""
    rows = hidden.shape[0]
    if name not in buffers or buffers[name].shape[0] < rows:
        # one spare row: chunk sizes differ by one
        buffers[name] = hidden.new_empty((rows + 1, head.weight.shape[0]), dtype=head.compute_dtype)
    return buffers[name][:rows]


def _cross_entropy_chunk(
    head: FrozenHead, hidden: Tensor, targets: Tensor, wanted: bool, buffers: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    # CE = log sum exp(z) - z_target, computed with z less its maximum; its gradient for z is softmax(z) - onehot.
    logits = head.logits(hidden, _buffer(buffers, "logits", hidden, head))
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    # the derivative of the soft cap needs the logits, which are overwritten below
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
    # Here `logits` holds exp(z - top). Both terms of the gradient are multiplied by `total`, and the division follows
    # after the product with the weight, on [tokens hidden] instead of [tokens vocab].
    logits[torch.arange(len(targets), device=targets.device), targets] -= total
    return values, head.gradient_for_hidden(logits, kept) / total[:, None]


def _kl_chunk(
    head: FrozenHead, hidden: Tensor, reference: Tensor, wanted: bool, buffers: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    # With p the reference, z the difference of the logits and d = z - E_p[z]:
    #   KL = log E_p[exp(z)] - E_p[z] = log(1 + excess), excess = E_p[exp(d) - 1] >= 0 (Jensen).
    # The usual sum of p (log p - log q) subtracts numbers of order 10 to get a KL of 1e-4.
    reference_logits = head.logits(reference, _buffer(buffers, "other", hidden, head))
    logits = head.logits(hidden, _buffer(buffers, "logits", hidden, head))
    kept = logits.clone() if wanted and head.soft_cap is not None else None
    parts = []
    for rows in _cached_rows(logits):
        shift, room = logits[rows].sub_(reference_logits[rows]), reference_logits[rows]
        p = functional.softmax(room, dim=1)
        shift -= torch.mul(p, shift, out=room).sum(1, keepdim=True)
        if bool(shift.amax() > _WIDE):
            return _kl_chunk_wide(head, hidden, reference, wanted)
        weighted = shift.exp_().sub_(1).mul_(p)
        parts.append(weighted.sum(1, keepdim=True).clamp_min_(0))
        if wanted:
            # q = p exp(d) / (1 + excess), so q - p = (p (exp(d) - 1) - p excess) / (1 + excess): the gradient for z
            weighted.addcmul_(p, parts[-1], value=-1)
    excess = torch.cat(parts)
    gradient = head.gradient_for_hidden(logits, kept) / (1 + excess) if wanted else None
    return excess[:, 0].log1p(), gradient


def _cached_rows(logits: Tensor) -> Iterator[slice]:
    """Groups of rows that stay in a core's cache through several elementwise passes; one group on a GPU."""
    num_rows = logits.shape[0]
    step = num_rows if logits.is_cuda else max(1, _CACHE_BYTES // (logits.shape[1] * logits.itemsize))
    for start in range(0, num_rows, max(step, 1)):
        yield slice(start, start + step)


def _kl_chunk_wide(
    head: FrozenHead, hidden: Tensor, reference: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The textbook formula, for two models so far apart that exp(difference) leaves the number range."""
    logits = head.logits(hidden)
    log_p, log_q = (
        functional.log_softmax(head.logits(reference), dim=1),
        functional.log_softmax(logits, dim=1),
    )
    p = log_p.exp()
    values = (p * (log_p - log_q)).sum(1)
    return values, head.gradient_for_hidden(log_q.exp() - p, logits) if wanted else None
