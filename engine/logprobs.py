"""Compute log-probabilities of chosen tokens without ever holding a [tokens, vocabulary] matrix.

This is the one function that turns hidden states into log-probabilities, for SFT, for the policy,
for the old log-probabilities and for the reference. It works in fp32 on chunks of tokens. While a
chunk's logits exist it also takes the gradient with respect to the hidden states, so nothing of the
vocabulary's size is kept for the backward pass. The head is frozen and gets no gradient.

Shapes: M tokens, m of them in a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """Compute log softmax(hidden @ lm_head_weight.T / temperature) at `targets`.

    hidden [M,H] any float dtype, lm_head_weight [V,H], targets [M] int64.
    suppress_token_ids: ids that are left out of the vocabulary.
    softcap: c, where the model's logits are c tanh(x / c) of the product x (`logit_softcap` in
        engine/families.py).
    chunk_size: tokens at a time.
    entropy: whether to compute the entropy, in nats, of the same tempered distribution.
    Returns (logprobs [M], entropy [M] or None), fp32 (fp64 for fp64 input), both differentiable
    with respect to `hidden`.

    The product with the head runs in the head's dtype, as in sampling. Everything after it runs in
    fp32. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}; log-probabilities need a positive one (1.0 for the"
            " model's own)"
        )
    # A list that is made into a tensor of a GPU would be waited for.
    suppressed = torch.tensor(list(suppress_token_ids), dtype=torch.long)
    suppressed = suppressed.to(hidden.device, non_blocking=True)
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
    """Turn the product of states and head into tempered logits, for training and sampling alike.

    logits [m,V]: may be overwritten.
    suppressed [k] int64: ids that get -inf.
    Returns [m,V] fp32 (fp64 for fp64 input), -inf at the suppressed ids.
    """
    # Cast up first. Everything after it is in place.
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
    """Tell for each target whether it is the model's most probable token [M] bool.

    Its mean is the token accuracy.
    """
    chunks = [
        _head(hidden[i : i + chunk_size], lm_head_weight).argmax(1)
        for i in range(0, len(hidden), chunk_size)
    ]
    return torch.cat(chunks) == targets if chunks else targets.bool()


class _ChunkedLogProbs(torch.autograd.Function):
    """Compute log-probabilities (and entropies) in chunks, with their gradient.

    The forward pass also stores d logprob / d hidden, so the backward pass only scales its rows.
    The entropy's gradient is needed rarely (by forks with an entropy bonus), so the backward pass
    computes it anew, and only when asked. A chunk holds one [m,V] tensor, two with the entropy, and
    one more for the slope of soft-capping. They are changed in place and freed before the next
    chunk's are made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        suppressed: Tensor,
        softcap: float | None,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)  # [M]
        entropies = torch.zeros_like(logprobs)  # [M]
        # d logprob / d hidden, [M,H]
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            target = targets[chunk, None]  # [m,1]
            logits = scaled_logits(
                _head(hidden[chunk], weight), temperature, suppressed, softcap
            )  # [m,V]
            slope = None if jacobian is None else _slope(logits, temperature, softcap)  # [m,V]
            # Without this fp32 loses digits to the logits' size, most of all in the entropy.
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
            if jacobian is not None:  # d logprob_y / d logit_k = 1[k = y] - p_k
                direction = exponentials.div_(-z).scatter_add_(
                    1, target, torch.ones_like(z)
                )  # [m,V]
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
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        jacobian, hidden, entropies, weight, suppressed = ctx.saved_tensors
        grad = torch.zeros_like(jacobian)  # [M,H]
        if grad_logprobs is not None:
            grad = grad + jacobian * grad_logprobs[:, None]
        if grad_entropies is not None:
            for start in range(0, len(hidden), ctx.chunk_size):
                chunk = slice(start, start + ctx.chunk_size)
                logits = scaled_logits(
                    _head(hidden[chunk], weight), ctx.temperature, suppressed, ctx.softcap
                )  # [m,V]
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
    """Multiply states with the head -> [m,V] in the head's dtype."""
    return hidden.to(weight.dtype) @ weight.t()


def _finite(logs: Tensor) -> Tensor:
    """Make the -inf of suppressed ids finite, in place, because 0 * -inf would be NaN."""
    return logs.clamp_(min=torch.finfo(logs.dtype).min)


def _slope(logits: Tensor, temperature: float, softcap: float | None) -> Tensor | None:
    """Compute d soft-capped logit / d logit [m,V] from `scaled_logits`, None without soft-capping.

    d c tanh(x / c) / dx = 1 - tanh(x / c)^2
    """
    if softcap is None:
        return None
    # A suppressed logit is -inf. Its slope is clamped to 0.
    return logits.mul(temperature / softcap).square_().neg_().add_(1).clamp_(min=0)


def _through_head(
    direction: Tensor, slope: Tensor | None, weight: Tensor, dtype: torch.dtype, temperature: float
) -> Tensor:
    """Carry d / d scaled logits [m,V] through the head to d / d hidden [m,H] of the given dtype.

    Overwrites `direction`.
    """
    if slope is not None:
        direction *= slope
    return (direction.to(weight.dtype) @ weight).to(dtype) / temperature
