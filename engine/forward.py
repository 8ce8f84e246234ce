"""Run the decoder in one packed row, for training, scoring and sampling.

A prompt runs once for all its completions in the batch. The packed row has no padding, and
engine/attention.py lets each completion see only its prompt and itself. Every completion's position
ids continue where its prompt ended. So the states and gradients are those of the completions run
one by one (tests/helpers/plain.py does that).

`completion_logprobs` is the one forward of training, of the reference and of teacher-forced
scoring. `read_prompts` (prefill) and `read_tokens` (decode) are the two forwards of the sampler.
The vision tower does not run here: prompts bring the features of their image (engine/vision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.attention import Places, SharedPromptMask, spread
from engine.cache import DecodingMask
from engine.collate import Batch, PromptBatch
from engine.families import (
    Family,
    language_model,
    lm_head_weight,
    logit_softcap,
    next_positions,
    unwrapped,
)
from engine.logprobs import token_logprobs


def embed(net: nn.Module, prompts: PromptBatch) -> Tensor:
    """Embed prompts [B,S,H], with each image's features in place of its placeholders."""
    # Placeholders are told by their type, not by their id: a sampled one would not be an image.
    is_image = prompts.token_types == 1  # [B,S]
    # Gemma's placeholder id can lie outside the vocabulary.
    text_ids = prompts.input_ids.masked_fill(is_image, 0)
    embeddings = unwrapped(net).get_input_embeddings()(text_ids)  # [B,S,H]
    # masked_scatter fills the placeholders prompt by prompt, in this order.
    rows = torch.cat([image["features"] for image in prompts.vision])  # [placeholders,H]
    return embeddings.masked_scatter(is_image[..., None], rows.to(embeddings.dtype))


def completion_hidden_states(net: nn.Module, family: Family, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the states that predict the K scored tokens of a batch, completion by completion.

    Returns (hidden [K,H], targets [K] int64, the ids of the scored tokens).
    """
    inner = unwrapped(net)
    read_ids = batch.completion_ids[:, : batch.read_mask.shape[1]]  # [N,R]
    read_ids = read_ids.flatten()[batch.read_places]  # [m]
    of_prompts = embed(net, batch.prompts).flatten(0, 1)[batch.prompt_places]
    embeddings = torch.cat([of_prompts, inner.get_input_embeddings()(read_ids)])  # [M,H]
    states = family.run_decoder(
        language_model(net),
        embeddings,
        packed_positions(inner, family, batch),
        shared_prompt_masks(inner, family, batch),
        batch.prompts,
        batch.prompt_places,
    )  # [M,H]
    return states[batch.predictors], batch.completion_ids.flatten()[batch.scored_places]


def read_prompts(
    net: nn.Module,
    family: Family,
    prompts: PromptBatch,
    places: Tensor,
    keep: Callable[[int, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Run the prompts once (prefill), hand out their keys and values, return what comes next.

    places [M] int64: flat index in [B,S] of every prompt token (no padding).
    keep(layer, keys, values): called in every layer with [B,S,K,D] each.
    Returns (hidden [B,H], the state that predicts the token after each prompt, and positions [B]
    int64, that token's position id).
    """
    inner = unwrapped(net)
    num_prompts, length = prompts.input_ids.shape
    layout = Places(places, (num_prompts, length))
    masks = prompt_masks(inner, family, prompts)
    once = {id(mask): SharedPromptMask(layout, mask, keep=keep) for mask in masks.values()}
    positions = family.positions(inner, prompts)  # [..,B,S]
    states = family.run_decoder(
        language_model(net),
        embed(net, prompts).flatten(0, 1)[places],
        positions.flatten(-2)[..., places].unsqueeze(-2),
        {kind: once[id(mask)] for kind, mask in masks.items()},
        prompts,
        places,
    )  # [M,H]
    return states[prompts.attention_mask.sum(1).cumsum(0) - 1], next_positions(positions)


def read_tokens(
    net: nn.Module,
    family: Family,
    tokens: Tensor,
    positions: Tensor,
    masks: dict[str, DecodingMask],
) -> Tensor:
    """Run the newest token of n completions (decode) -> the states that predict the next ones.

    tokens [n] int64, positions [n] int64: ids and position ids of the newest tokens.
    masks: one for each kind of layer. Their cache takes in the tokens' keys and values.
    Returns [n,H].
    """
    return family.run_decoder(
        language_model(net),
        unwrapped(net).get_input_embeddings()(tokens),
        family.expand_positions(positions[None]),
        masks,
    )


def packed_positions(net: PreTrainedModel, family: Family, batch: Batch) -> Tensor:
    """Compute the position ids of the packed row, [3,1,M] (Qwen) or [1,M].

    The prompts' position ids come first. Each completion then continues where its own prompt ended.
    """
    prompts = family.positions(net, batch.prompts)  # [..,B,S]
    columns = torch.arange(batch.read_mask.shape[1], device=prompts.device)
    completions = next_positions(prompts)[batch.prompt_of_row][:, None] + columns  # [N,R]
    completions = family.expand_positions(completions)  # [..,N,R]
    return torch.cat(
        [
            prompts.flatten(-2)[..., batch.prompt_places],
            completions.flatten(-2)[..., batch.read_places],
        ],
        -1,
    ).unsqueeze(-2)


def shared_prompt_masks(
    net: PreTrainedModel, family: Family, batch: Batch
) -> dict[str, SharedPromptMask]:
    """Make the masks of a packed training row, one for each kind of layer.

    A prompt sees itself as it would alone. A completion is treated as the last part of a row that
    holds its prompt, padded on the left, and its own tokens.
    """
    prompts, rows = batch.prompts, batch.prompt_of_row
    num_prompts, size = prompts.input_ids.shape
    places = Places(batch.prompt_places, (num_prompts, size), batch.buckets)
    of_prompts = prompt_masks(net, family, prompts)
    alike, read = slice(1 if prompts.alike else None), batch.read_mask.shape[1]
    # Completions are padded on the right, where none of their tokens looks, so all places count.
    whole = torch.cat([prompts.attention_mask[rows], torch.ones_like(batch.read_mask)], 1)
    whole = whole[alike]  # [N,S+R] or [1,S+R]
    # What a completion sees does not depend on where the image is, so all tokens count as text.
    text = torch.zeros_like(whole, dtype=torch.long)
    of_completions = family.attention_masks(
        net, whole, text, torch.arange(size, size + read, device=rows.device)
    )
    # Kinds of layers that see the same share one object, so its additive masks are made once.
    once = {
        id(mask): SharedPromptMask(places, of_prompts[kind], mask)
        for kind, mask in of_completions.items()
    }
    return {kind: once[id(mask)] for kind, mask in of_completions.items()}


def prompt_masks(net: PreTrainedModel, family: Family, prompts: PromptBatch) -> dict[str, Tensor]:
    """Make the masks of the prompts, one for each kind of layer.

    Returns bool [B,1,S,S], or [1,1,S,S] where all prompts see the same.
    """
    alike = slice(1 if prompts.alike else None)
    queries = torch.arange(prompts.input_ids.shape[1], device=prompts.input_ids.device)
    return family.attention_masks(
        net, prompts.attention_mask[alike], prompts.token_types[alike], queries
    )


def completion_logprobs(
    net: nn.Module,
    family: Family,
    batch: Batch,
    *,
    temperature: float,
    suppress_token_ids: Sequence[int] = (),
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-probabilities of every completion's tokens under the active adapter.

    temperature: the sampling temperature.
    suppress_token_ids: ids that get probability 0.
    entropy: whether to compute each token's entropy as well.
    Returns (logprobs [N,T] fp32, entropy [N,T] fp32 or None), 0 outside `completion_mask`.
    """
    hidden, targets = completion_hidden_states(net, family, batch)  # [K,H], [K]
    head = lm_head_weight(net)  # [V,H]
    logprobs, entropies = token_logprobs(
        hidden,
        head,
        targets,
        temperature=temperature,
        suppress_token_ids=suppress_token_ids,
        softcap=logit_softcap(net),
        entropy=entropy,
    )  # [K]
    rows, length = batch.completion_mask.shape
    return spread(logprobs, batch.scored_places, (rows, length)), (
        None if entropies is None else spread(entropies, batch.scored_places, (rows, length))
    )
