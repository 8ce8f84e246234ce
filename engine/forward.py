"""Hidden states: of a batch of completions, the one forward of training, of the reference and of
teacher-forced scoring; and, for the sampler, of prompts and of the tokens that it writes after
them.

A prompt runs once for all its completions in the batch, in one row without padding;
engine/attention.py lets each completion see its prompt and itself alone. Positions go on from the
prompt's for every completion anew, so states and gradients are those of the completions one by one
(tests/plain.py). The vision tower does not run here: prompts bring their image's features
(engine/vision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.attention import Places, SharedPromptMask, spread
from engine.cache import DecodingMask, SamplingCache
from engine.collate import Batch, Prompts
from engine.families import (
    Family,
    language_model,
    lm_head_weight,
    logit_softcap,
    next_positions,
    unwrapped,
)
from engine.logprobs import token_logprobs


def embed(model: nn.Module, prompts: Prompts) -> Tensor:
    """Input embeddings [B,S,H] of prompts, with every image's features in its placeholders."""
    # by type, not by id: a sampled placeholder id would not be an image
    is_image = prompts.token_types == 1  # [B,S]
    # Gemma's placeholder id can lie outside the vocabulary
    text_ids = prompts.input_ids.masked_fill(is_image, 0)
    embeddings = unwrapped(model).get_input_embeddings()(text_ids)  # [B,S,H]
    # row by row
    rows = torch.cat([image["features"] for image in prompts.vision])  # [placeholders,H]
    return embeddings.masked_scatter(is_image[..., None], rows.to(embeddings.dtype))


def completion_hidden_states(
    model: nn.Module, family: Family, batch: Batch
) -> tuple[Tensor, Tensor]:
    """(hidden [K,H], targets [K]): for each of the K scored tokens, completion by completion, the
    state that predicts it, and its id.
    """
    base = unwrapped(model)
    # [m]
    read_ids = batch.completion_ids[:, : batch.read_mask.shape[1]].flatten()[batch.read_places]
    of_prompts = embed(model, batch.prompts).flatten(0, 1)[batch.prompt_places]
    embeddings = torch.cat([of_prompts, base.get_input_embeddings()(read_ids)])  # [M,H]
    states = language_model(model)(
        inputs_embeds=embeddings[None],
        position_ids=packed_positions(base, family, batch),
        attention_mask=shared_prompt_masks(base, family, batch),
        use_cache=False,
    ).last_hidden_state[0]  # [M,H]
    return states[batch.predictors], batch.completion_ids.flatten()[batch.scored_places]


def read_prompts(
    model: nn.Module,
    family: Family,
    prompts: Prompts,
    places: Tensor,
    keep: Callable[[int, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """(hidden [B,H], positions [B]): the state that predicts the token after each prompt, and that
    token's position.

    places [M] int64: of the prompts' tokens in the flat [B,S]. keep(layer, keys, values) is told
    every layer's keys and values, [B,S,K,D].
    """
    base = unwrapped(model)
    layout = Places(places, tuple(prompts.input_ids.shape))
    masks = prompt_masks(base, family, prompts)
    once = {id(mask): SharedPromptMask(layout, mask, keep=keep) for mask in masks.values()}
    positions = family.positions(base, prompts)  # [..,B,S]
    states = language_model(model)(
        inputs_embeds=embed(model, prompts).flatten(0, 1)[None, places],
        position_ids=positions.flatten(-2)[..., places].unsqueeze(-2),
        attention_mask={kind: once[id(mask)] for kind, mask in masks.items()},
        use_cache=False,
    ).last_hidden_state[0]  # [M,H]
    return states[prompts.attention_mask.sum(1).cumsum(0) - 1], next_positions(positions)


def read_tokens(
    model: nn.Module,
    family: Family,
    tokens: Tensor,
    positions: Tensor,
    masks: dict[str, DecodingMask],
) -> Tensor:
    """[n,H]: the states that predict the next tokens of n completions after their last `tokens`
    [n], at `positions` [n], which are kept in the cache of the masks.
    """
    return language_model(model)(
        inputs_embeds=unwrapped(model).get_input_embeddings()(tokens)[None],
        position_ids=family.expand_positions(positions[None]),
        attention_mask=masks,
        use_cache=False,
    ).last_hidden_state[0]


def decoding_masks(
    model: nn.Module,
    family: Family,
    cache: SamplingCache,
    rows: Tensor,
    steps: Tensor,
    prompt_mask: Tensor,
    length: int,
) -> list[dict[str, DecodingMask]]:
    """For each of the next Q tokens of n completions what it sees, in every kind of layer.

    rows [n] int64: the completions' places in the cache; steps [Q,n] int64: the places of the
    tokens in their completions. prompt_mask [n,S] bool: the prompt of each in the last S places of
    the cache, true where a token is. length: of the longest completion with the first of these
    tokens.
    """
    size, ahead = prompt_mask.shape[1], len(steps)
    # [n,S+R+Q-1]
    whole = torch.cat([prompt_mask, prompt_mask.new_ones(len(rows), length + ahead - 1)], 1)
    text = torch.zeros_like(whole, dtype=torch.long)
    # [n,1,Q,S+R+Q-1]
    visible = family.attention_masks(unwrapped(model), whole, text, size + steps.t())
    dtype, grid = language_model(model).dtype, (cache.num_prompts, cache.generations)
    once = {id(mask): mask for mask in visible.values()}  # two kinds of layers may see the same
    numbers = {
        key: spread(
            torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, -torch.inf
            ),
            rows,
            grid,
        )
        for key, mask in once.items()
    }  # [B,W,1,Q,S+R+Q-1]
    return [
        {
            kind: DecodingMask(
                cache,
                rows,
                steps[i],
                size,
                length + i,
                numbers[id(mask)][:, :, :, i : i + 1, : size + length + i],
            )
            for kind, mask in visible.items()
        }
        for i in range(ahead)
    ]


def packed_positions(model: nn.Module, family: Family, batch: Batch) -> Tensor:
    """Position ids of the packed row, [3,1,M] or [1,M]: those of the prompts, then of each
    completion, which begins again where its prompt ended.
    """
    prompts = family.positions(model, batch.prompts)  # [..,B,S]
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
    model: nn.Module, family: Family, batch: Batch
) -> dict[str, SharedPromptMask]:
    """For every kind of layer what the tokens of the packed row see: in a prompt as ever; a
    completion is the last part of a row that its prompt, padded on the left, and its own tokens
    make.
    """
    prompts, rows = batch.prompts, batch.prompt_of_row
    places = Places(batch.prompt_places, tuple(prompts.input_ids.shape), batch.buckets)
    of_prompts = prompt_masks(model, family, prompts)
    alike, size, read = (
        slice(1 if prompts.alike else None),
        places.prompt_shape[1],
        batch.read_mask.shape[1],
    )
    # A completion's padding comes after it, where none of its tokens looks: as if there were none.
    # or [1,S+R]
    whole = torch.cat([prompts.attention_mask[rows], torch.ones_like(batch.read_mask)], 1)[
        alike
    ]  # [N,S+R]
    # nothing that a completion sees depends on where the image is
    text = torch.zeros_like(whole, dtype=torch.long)
    of_completions = family.attention_masks(
        model, whole, text, torch.arange(size, size + read, device=rows.device)
    )
    # The same object where two kinds of layers see the same: what it keeps is kept once.
    once = {
        id(mask): SharedPromptMask(places, of_prompts[kind], mask)
        for kind, mask in of_completions.items()
    }
    return {kind: once[id(mask)] for kind, mask in of_completions.items()}


def prompt_masks(model: nn.Module, family: Family, prompts: Prompts) -> dict[str, Tensor]:
    """What the tokens of each prompt see, for every kind of layer: bool [B,1,S,S], or [1,1,S,S]
    where all are alike.
    """
    alike, queries = (
        slice(1 if prompts.alike else None),
        torch.arange(prompts.input_ids.shape[1], device=prompts.input_ids.device),
    )
    return family.attention_masks(
        model, prompts.attention_mask[alike], prompts.token_types[alike], queries
    )


def completion_logprobs(
    model: nn.Module,
    family: Family,
    batch: Batch,
    *,
    temperature: float,
    suppress_token_ids: Sequence[int] = (),
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs [N,T], entropy [N,T] or None) of every completion under the active adapter; 0
    outside `completion_mask`.
    """
    hidden, targets = completion_hidden_states(model, family, batch)  # [K,H], [K]
    head = lm_head_weight(model)  # [V,H]
    logprobs, entropies = token_logprobs(
        hidden,
        head,
        targets,
        temperature=temperature,
        suppress_token_ids=suppress_token_ids,
        softcap=logit_softcap(model),
        entropy=entropy,
    )  # [K]
    shape = tuple(batch.completion_mask.shape)
    return spread(logprobs, batch.scored_places, shape), (
        spread(entropies, batch.scored_places, shape) if entropy else None
    )
