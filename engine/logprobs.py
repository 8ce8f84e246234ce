"""Log-probabilities of chosen tokens, without ever holding a [tokens, vocabulary] matrix.

The one function that turns hidden states into log-probabilities, for SFT, policy, old and reference alike. It works in
chunks of tokens in fp32, and takes the gradient with respect to the hidden states while the chunk's logits exist, so
nothing of the vocabulary's size is kept for the backward pass. The head is frozen, so it gets no gradient.

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
    chunk_size: int = CHUNK_SIZE,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ lm_head_weight.T / temperature) at `targets`, over the vocabulary less `suppress_token_ids`.

    hidden [M,H] any float dtype, lm_head_weight [V,H], targets [M] int64. Returns (logprobs [M], entropy [M] or None), fp32
    (fp64 for fp64 input), entropy in nats of the same tempered distribution. Both are differentiable with respect to
    `hidden`. The product with the head runs in its own dtype, as in sampling; everything after it in fp32. Raises
    ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a positive one (1.0 for the model's own)")
    suppressed = torch.as_tensor(list(suppress_token_ids), dtype=torch.long, device=hidden.device)
    logprobs, entropies = _ChunkedLogProbs.apply(
        hidden, lm_head_weight, targets, float(temperature), suppressed, chunk_size, entropy
    )
    return logprobs, entropies if entropy else None


def scaled_logits(hidden: Tensor, lm_head_weight: Tensor, temperature: float, suppressed: Tensor) -> Tensor:
    """[m,V] logits / temperature in fp32 (fp64 for fp64 input), -inf at the suppressed ids. Shared with the sampler."""
    logits = hidden.to(lm_head_weight.dtype) @ lm_head_weight.t()  # [m,V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # up-cast first, then divide
    return logits.index_fill(1, suppressed, -torch.inf)


@torch.no_grad()
def predicted_correctly(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Tensor:
    """[M] bool: whether each target is the model's most probable token. Its mean is the token accuracy."""
    chunks = [
        (hidden[i : i + chunk_size].to(lm_head_weight.dtype) @ lm_head_weight.t()).argmax(1)
        for i in range(0, len(hidden), chunk_size)
    ]
    return torch.cat(chunks) == targets if chunks else targets.bool()


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward: log-probabilities (and entropies) by chunks, with d logprob / d hidden. Backward: a row scale.

    The entropy's gradient is rare (entropy-bonus forks), so it is recomputed in the backward pass and only when it is asked
    for.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, suppressed, chunk_size, with_entropy):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)  # [M]
        entropies = torch.zeros_like(logprobs)  # [M]
        needs_gradient = ctx.needs_input_grad[0]
        jacobian = torch.empty_like(hidden) if needs_gradient else None  # [M,H] d logprob / d hidden
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            chosen = targets[chunk, None]  # [m,1]
            logits = scaled_logits(hidden[chunk], weight, temperature, suppressed)  # [m,V]
            logits -= logits.amax(1, keepdim=True)  # or fp32 loses digits to the size of the logits, the entropy most of all
            log_z = torch.logsumexp(logits, 1, keepdim=True)  # [m,1]
            logprobs[chunk] = (logits.gather(1, chosen) - log_z)[:, 0]
            if not (needs_gradient or with_entropy):
                continue
            probabilities = (logits - log_z).exp()  # [m,V]
            if with_entropy:
                entropies[chunk] = log_z[:, 0] - (probabilities * logits.clamp(min=torch.finfo(dtype).min)).sum(1)
            if needs_gradient:  # d logprob_y / d logit_k = 1[k = y] - p_k
                direction = probabilities.neg_().scatter_add_(1, chosen, torch.ones_like(log_z))  # [m,V]
                jacobian[chunk] = (direction.to(weight.dtype) @ weight).to(hidden.dtype) / temperature
        ctx.save_for_backward(jacobian, hidden if with_entropy else None, weight, suppressed)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropies):
        jacobian, hidden, weight, suppressed = ctx.saved_tensors
        grad = torch.zeros_like(jacobian)  # [M,H]
        if grad_logprobs is not None:
            grad = grad + jacobian * grad_logprobs[:, None]
        if grad_entropies is not None:
            for start in range(0, len(hidden), ctx.chunk_size):
                chunk = slice(start, start + ctx.chunk_size)
                logs = scaled_logits(hidden[chunk], weight, ctx.temperature, suppressed).log_softmax(1)  # [m,V]
                probabilities = logs.exp()
                logs = logs.clamp(min=torch.finfo(logs.dtype).min)  # suppressed: probability 0, and 0 * -inf would be NaN
                entropy = -(probabilities * logs).sum(1, keepdim=True)  # [m,1]
                direction = (
                    -probabilities * (logs + entropy) * grad_entropies[chunk, None]
                )  # [m,V] dH / d logit_k = -p_k (log p_k + H)
                grad[chunk] += (direction.to(weight.dtype) @ weight).to(grad.dtype) / ctx.temperature
        return grad, None, None, None, None, None, None
