"""The sampler, for rollouts and for evaluation.

Written out so that nothing else decides how completions are drawn: temperature first, then the nucleus, then one uniform
number a row and step. Of the model's generation_config only the stop ids are used (see engine/families.py). Suppressed ids
(image tokens) have probability 0, here as in every log-probability.

The uniform numbers are drawn for all rows at every step, so a completion depends neither on which rows have already
finished nor on padding.

Shapes: B rows, Q new tokens of a call, S tokens so far, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from data.collate import Prompts, collate_prompts
from data.encode import EncodedPrompt
from engine.families import language_model, lm_head_weight, logit_softcap, next_positions, unwrapped
from engine.forward import embed
from engine.logprobs import scaled_logits
from engine.model import LoadedModel


COMPACT_AT = 0.25  # share of finished rows at which they are dropped: each time costs a copy of the whole cache


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn. temperature 0 is greedy decoding."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_completion_length: int = 512


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    ids [C] int64, up to and including the stop token; logprobs [C] fp32 of those tokens at the sampling temperature over
    the whole vocabulary less the suppressed ids (at temperature 1 when greedy); top_p_mass [C] fp32, what the nucleus held.
    truncated: no stop token came.
    """

    ids: Tensor
    logprobs: Tensor
    top_p_mass: Tensor
    truncated: bool


class Nucleus(NamedTuple):
    """ids [B,V]: the vocabulary, most probable first; probabilities [B,V]: in that order, 0 outside the nucleus, not
    renormalised; mass [B]: their sum, at least top_p.
    """

    ids: Tensor
    probabilities: Tensor
    mass: Tensor


def nucleus(logprobs: Tensor, top_p: float) -> Nucleus:
    """The smallest set of most probable tokens whose mass reaches `top_p`, the token that crosses it included. logprobs
    [B,V].
    """
    ordered, ids = logprobs.sort(dim=1, descending=True, stable=True)
    probabilities = ordered.exp()
    before = probabilities.cumsum(1) - probabilities  # mass of the more probable tokens
    kept = probabilities * ((before < top_p) | (top_p >= 1))  # a sum that rounds to 1 early must not cut the tail
    kept[:, 0] = probabilities[:, 0]  # the first token always stays, also at top_p 0
    return Nucleus(ids, kept, kept.sum(1))


def draw(logprobs: Tensor, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(token [B], nucleus mass [B]): one token a row from the renormalised nucleus, by inverting its distribution at
    `uniform` [B] in [0, 1).
    """
    ids, probabilities, mass = nucleus(logprobs, top_p)
    cumulative = probabilities.cumsum(1)
    rank = (cumulative <= (uniform.to(mass.dtype) * mass)[:, None]).sum(1)
    last = (probabilities > 0).sum(1) - 1  # rounding must not step past the nucleus
    return ids.gather(1, torch.minimum(rank, last)[:, None])[:, 0], mass


def completion_mask(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """[N,T] ids -> [N,T] bool: true up to and including the first stop token, and everywhere in a row without one.

    By position, never by comparing with the padding id, which may be a stop id.
    """
    is_stop = torch.isin(ids, torch.tensor(sorted(stop_ids), device=ids.device))  # [N,T]
    stopped_before = is_stop.long().cumsum(1) - is_stop.long()  # stop tokens strictly before each token
    return stopped_before == 0


def is_truncated(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """[N,T] ids -> [N] bool: no stop token came. One on the last position is not a truncation."""
    return ~torch.isin(ids, torch.tensor(sorted(stop_ids), device=ids.device)).any(1)


@torch.no_grad()
def generate(
    wrapped: PeftModel | nn.Module,
    model: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    *,
    num_generations: int = 1,
    generator: torch.Generator | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[Completion]]:
    """`num_generations` completions of every prompt, in the prompts' order.

    wrapped: the model with its active adapter (or the base). generator: a CPU generator; needed unless greedy. should_stop
    is asked before every token: once it says so, KeyboardInterrupt is raised, for the caller to discard the whole rollout.
    Runs in eval() mode and restores the mode that it found. All completions are written together: the cache of
    len(prompts) x num_generations rows must fit the memory.
    """
    if sampling.temperature > 0 and generator is None:
        raise ValueError("sampling needs a torch.Generator; give one, or temperature 0 for greedy decoding")
    was_training = wrapped.training
    wrapped.eval()
    try:
        batch = collate_prompts(list(prompts), model.encoder.pad_token_id).to(lm_head_weight(wrapped).device)
        ids, logprobs, masses = _decode(wrapped, model, batch, sampling, num_generations, generator, should_stop)
    finally:
        wrapped.train(was_training)
    mask, truncated = completion_mask(ids, model.stop_ids), is_truncated(ids, model.stop_ids)
    completions = [
        Completion(ids[i][mask[i]], logprobs[i][mask[i]], masses[i][mask[i]], bool(truncated[i])) for i in range(len(ids))
    ]
    return [completions[i : i + num_generations] for i in range(0, len(completions), num_generations)]


def _decode(wrapped, model: LoadedModel, batch: Prompts, sampling: SamplingConfig, num_generations: int,
            generator: torch.Generator | None, should_stop: Callable[[], bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logprobs, top-p masses), each [N,T] on the CPU; rows of one prompt lie together. What follows a stop token is
    padding.
    """
    base, decoder, head, family = unwrapped(wrapped), language_model(wrapped), lm_head_weight(wrapped), model.family
    softcap = logit_softcap(wrapped)
    device = batch.input_ids.device
    suppressed = torch.tensor(model.suppressed_ids, dtype=torch.long, device=device)
    stops = torch.tensor(sorted(model.stop_ids), device=device)
    cache = DynamicCache()  # every layer keeps everything; sliding windows are in the masks
    positions = family.positions(base, batch)  # [..,B,S]
    hidden = decoder(
        inputs_embeds=embed(wrapped, batch),
        position_ids=positions,
        cache=cache,
        use_cache=True,
        attention_mask=family.attention_masks(base, batch.attention_mask, batch.token_types, batch.input_ids.shape[1]),
    ).last_hidden_state[:, -1]  # [B,H]
    next_position = next_positions(positions)  # [B]

    # One prompt was read once; from here each of its completions is a row.
    cache.batch_repeat_interleave(num_generations)
    hidden, next_position, attention_mask, token_types = (
        tensor.repeat_interleave(num_generations, 0)
        for tensor in (hidden, next_position, batch.attention_mask, batch.token_types)
    )
    num_rows, length = len(hidden), sampling.max_completion_length
    ids = torch.full((num_rows, length), model.encoder.pad_token_id, dtype=torch.long)
    logprobs, masses = torch.zeros(num_rows, length), torch.ones(num_rows, length)
    rows = torch.arange(num_rows, device=device)  # rows in the batch
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)  # those of them that are still being written

    for step in range(length):
        if should_stop():
            raise KeyboardInterrupt
        tempered = scaled_logits(hidden, head, sampling.temperature or 1.0, suppressed, softcap).log_softmax(1)  # [rows,V]
        if sampling.temperature > 0:
            uniform = torch.rand(num_rows, generator=generator)[rows.cpu()].to(device)
            tokens, mass = draw(tempered, sampling.top_p, uniform)
        else:
            tokens = tempered.argmax(1)
            mass = torch.ones_like(tempered[:, 0])
        at = rows[alive].cpu()
        ids[at, step] = tokens[alive].cpu()
        logprobs[at, step] = tempered.gather(1, tokens[:, None])[alive, 0].float().cpu()
        masses[at, step] = mass[alive].float().cpu()
        alive &= ~torch.isin(tokens, stops)
        if not alive.any() or step == length - 1:
            return ids[:, : step + 1], logprobs[:, : step + 1], masses[:, : step + 1]
        if alive.sum() <= (1 - COMPACT_AT) * len(alive):  # finished rows leave the batch and the cache
            cache.batch_select_indices(alive.nonzero()[:, 0])
            rows, tokens, next_position, attention_mask, token_types, alive = (
                tensor[alive] for tensor in (rows, tokens, next_position, attention_mask, token_types, alive))
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)  # [rows,S]
        token_types = torch.cat([token_types, torch.zeros_like(token_types[:, :1])], 1)
        hidden = decoder(inputs_embeds=base.get_input_embeddings()(tokens[:, None]),
                         position_ids=family.expand_positions((next_position + step)[:, None]),
                         attention_mask=family.attention_masks(base, attention_mask, token_types, 1),
                         cache=cache, use_cache=True).last_hidden_state[:, -1]
    raise AssertionError("unreachable: the loop returns at its last step")
