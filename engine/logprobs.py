"""Log-probabilities of chosen tokens, without ever holding a [tokens, vocabulary] matrix.

The one function that turns hidden states into log-probabilities, for SFT, policy, old and reference
alike. It works in chunks of tokens in fp32, and takes the gradient with respect to the hidden
states while the chunk's logits exist, so nothing of the vocabulary's size is kept for the backward
pass. The head is frozen, so it gets no gradient.

Shapes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 256  # tokens at a time: 256 x 262,208 fp32 logits (Gemma 3) are 256 MiB


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    suppress_token_ids: Sequence[int] = (),
    softcap: float | None = None,
    chunk_size: int = CHUNK_SIZE,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ lm_head_weight.T / temperature) at `targets`, over the vocabulary less
    `suppress_token_ids`.

    hidden [M,H] any float dtype, lm_head_weight [V,H], targets [M] int64. Returns (logprobs [M],
    entropy [M] or None), fp32 (fp64 for fp64 input), entropy in nats of the same tempered
    distribution. Both are differentiable with respect to `hidden`. softcap c: the model's logits
    are c tanh(x / c) of the product x (engine.families.logit_softcap). The product with the head
    runs in its own dtype, as in sampling; everything after it in fp32. Raises ValueError for a
    temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; log-probabilities need a positive one (1.0 for the"
            " model's own)"
        )
    suppressed = torch.as_tensor(list(suppress_token_ids), dtype=torch.long, device=hidden.device)
    logprobs, entropies = _ChunkedLogProbs.apply(
        hidden,
        lm_head_weight,
        targets,
        float(temperature),
        suppressed,
        softcap,
        chunk_size,
        entropy,
    )
    return logprobs, entropies if entropy else None


@torch.no_grad()
def scaled_logits(
    logits: Tensor, temperature: float, suppressed: Tensor, softcap: float | None = None
) -> Tensor:
    """[m,V] logits / temperature in fp32 (fp64 for fp64 input), -inf at the suppressed ids, from
    `logits` [m,V], the product of states and head, which may be changed. Shared with the sampler.
    """
    # up-cast first; from here on in place
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1:
        logits.div_(temperature)
    return logits.index_fill_(1, suppressed, -torch.inf)


@torch.no_grad()
def predicted_correctly(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """[M] bool: whether each target is the model's most probable token. Its mean is the token
    accuracy.
    """
    chunks = [
        _head(hidden[i : i + chunk_size], lm_head_weight).argmax(1)
        for i in range(0, len(hidden), chunk_size)
    ]
    return torch.cat(chunks) == targets if chunks else targets.bool()


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward: log-probabilities (and entropies) by chunks, with d logprob / d hidden. Backward: a
    row scale.

    The entropy's gradient is rare (entropy-bonus forks), so it is recomputed in the backward pass
    and only when it is asked for. Of [m,V] a chunk holds one tensor, with the entropy two, with
    soft-capping one more for its slope: they are worked on in place, and are gone before the next
    chunk's are made.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, temperature, suppressed, softcap, chunk_size, with_entropy
    ):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)  # [M]
        entropies = torch.zeros_like(logprobs)  # [M]
        needs_gradient = ctx.needs_input_grad[0]
        # [M,H] d logprob / d hidden
        jacobian = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            target = targets[chunk, None]  # [m,1]
            # [m,V]
            logits = scaled_logits(_head(hidden[chunk], weight), temperature, suppressed, softcap)
            # [m,V] or None
            slope = _slope(logits, temperature, softcap) if needs_gradient else None
            # or fp32 loses digits to the size of the logits, the entropy most of all
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)  # [m,1]
            exponentials = logits.exp() if with_entropy else logits.exp_()  # [m,V] z p
            z = exponentials.sum(1, keepdim=True)  # [m,1]
            logprobs[chunk] = (chosen - z.log())[:, 0]
            if with_entropy:
                entropies[chunk] = (
                    z.log() - _finite(logits).mul_(exponentials).sum(1, keepdim=True) / z
                )[:, 0]
            del logits
            if needs_gradient:  # d logprob_y / d logit_k = 1[k = y] - p_k
                # [m,V]
                direction = exponentials.div_(-z).scatter_add_(1, target, torch.ones_like(z))
                jacobian[chunk] = _through_head(direction, slope, weight, hidden.dtype, temperature)
                del direction
            del exponentials, slope
        ctx.save_for_backward(
            jacobian, *(hidden, entropies) if with_entropy else (None, None), weight, suppressed
        )
        ctx.temperature, ctx.softcap, ctx.chunk_size = temperature, softcap, chunk_size
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropies):
        jacobian, hidden, entropies, weight, suppressed = ctx.saved_tensors
        grad = torch.zeros_like(jacobian)  # [M,H]
        if grad_logprobs is not None:
            grad = grad + jacobian * grad_logprobs[:, None]
        if grad_entropies is not None:
            for start in range(0, len(hidden), ctx.chunk_size):
                chunk = slice(start, start + ctx.chunk_size)
                # [m,V]
                logits = scaled_logits(
                    _head(hidden[chunk], weight), ctx.temperature, suppressed, ctx.softcap
                )
                slope = _slope(logits, ctx.temperature, ctx.softcap)  # [m,V] or None
                logits -= logits.amax(1, keepdim=True)
                exponentials = logits.exp()  # [m,V] z p
                z = exponentials.sum(1, keepdim=True)  # [m,1]
                logs = _finite(logits.sub_(z.log() - entropies[chunk, None]))  # [m,V] log p + H
                # dH / d logit_k = -p_k (log p_k + H)
                direction = exponentials.mul_(logs).mul_(-grad_entropies[chunk, None] / z)  # [m,V]
                del logits, logs
                grad[chunk] += _through_head(direction, slope, weight, grad.dtype, ctx.temperature)
                del exponentials, direction, slope
        return grad, None, None, None, None, None, None, None


def _head(hidden: Tensor, weight: Tensor) -> Tensor:
    """[m,V] in the head's dtype"""
    return hidden.to(weight.dtype) @ weight.t()


def _finite(logs: Tensor) -> Tensor:
    """The suppressed ids' -inf as a finite number, in place: their probability is 0, and 0 * -inf
    would be NaN.
    """
    return logs.clamp_(min=torch.finfo(logs.dtype).min)


def _slope(logits: Tensor, temperature: float, softcap: float | None) -> Tensor | None:
    """d soft-capped logit / d logit [m,V], from `scaled_logits`; None without soft-capping.

    d c tanh(x / c) / dx = 1 - tanh(x / c)^2
    """
    if softcap is None:
        return None
    # a suppressed logit is -inf: 0
    return logits.mul(temperature / softcap).square_().neg_().add_(1).clamp_(min=0)


def _through_head(
    direction: Tensor, slope: Tensor | None, weight: Tensor, dtype: torch.dtype, temperature: float
) -> Tensor:
    """d / d scaled logits [m,V] -> d / d hidden [m,H] of the given dtype. Changes `direction`."""
    if slope is not None:
        direction *= slope
    return (direction.to(weight.dtype) @ weight).to(dtype) / temperature
