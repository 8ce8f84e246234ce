"""Run the plain forward, the oracle of the product's.

Every completion is a padded row with its own copy of the prompt, run by the decoder with ordinary
masks. The image goes through the vision tower in the same call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from engine.collate import PromptBatch
from engine.completion import Completion, SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import (
    Family,
    ImageTensors,
    language_model,
    lm_head_weight,
    logit_softcap,
    unwrapped,
)
from engine.logprobs import token_logprobs
from engine.policy import Policy


@dataclass(frozen=True)
class PlainBatch:
    """Hold rows of S tokens, padded on the right.

    loss_mask [B,S] bool: the tokens that are scored
    completion_mask [B,T] bool: the same on the completion alone
    """

    prompts: PromptBatch  # prompt and completion as one
    loss_mask: Tensor
    completion_mask: Tensor


def plain_batch(rows: list[EncodedRow], pad_token_id: int) -> PlainBatch:
    def padded(sequences: list[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(sequences, batch_first=True, padding_value=value)

    whole = [torch.cat([row.prompt.input_ids, row.completion_ids]) for row in rows]
    return PlainBatch(
        prompts=PromptBatch(
            input_ids=padded(whole, pad_token_id),
            token_types=padded(
                [
                    torch.cat([row.prompt.token_types, torch.zeros_like(row.completion_ids)])
                    for row in rows
                ]
            ),
            attention_mask=padded([torch.ones(len(ids), dtype=torch.bool) for ids in whole]),
            vision=[row.prompt.vision for row in rows],
        ),
        loss_mask=padded(
            [
                torch.cat(
                    [torch.zeros(len(row.prompt.input_ids), dtype=torch.bool), row.completion_mask]
                )
                for row in rows
            ]
        ),
        completion_mask=padded([row.completion_mask for row in rows]),
    )


@torch.no_grad()
def seen(model: nn.Module, family: Family, prompts: PromptBatch) -> list[ImageTensors]:
    """Run the vision tower for every row that has pixels, and put its tensors in their place."""
    found = []
    for image in prompts.vision:
        rest = dict(image)
        if rest.pop("pixel_values", None) is not None:
            rest |= family.embed_image(unwrapped(model), image)
        found.append(rest)
    return found


def embed(model: nn.Module, family: Family, prompts: PromptBatch) -> Tensor:
    """Return input embeddings [B,S,H], the vision tower run for every row that has pixels."""
    features = [image["features"] for image in seen(model, family, prompts)]
    is_image = prompts.token_types == 1
    embeddings = unwrapped(model).get_input_embeddings()(prompts.input_ids.masked_fill(is_image, 0))
    return embeddings.masked_scatter(is_image[..., None], torch.cat(features).to(embeddings.dtype))


def deepstack(rows: PromptBatch) -> dict:
    """Return what a decoder with deepstack takes of rows whose images have been seen."""
    return {
        "visual_pos_masks": rows.token_types == 1,
        "deepstack_visual_embeds": torch.cat([image["deepstack"] for image in rows.vision]).unbind(
            1
        ),
    }


def predicted_tokens(loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns [K] of the tokens under `loss_mask` [B,S], row by row."""
    return loss_mask.nonzero(as_tuple=True)


def hidden_states(model: nn.Module, family: Family, batch: PlainBatch) -> tuple[Tensor, Tensor]:
    """Return (hidden [K,H], targets [K]) as engine.forward.completion_hidden_states does."""
    base, rows = unwrapped(model), batch.prompts
    rows = replace(rows, vision=seen(model, family, rows))
    masks = family.attention_masks(
        base, rows.attention_mask, rows.token_types, torch.arange(rows.input_ids.shape[1])
    )
    stacked = "deepstack" in rows.vision[0]
    output = language_model(model)(
        inputs_embeds=embed(model, family, rows),
        position_ids=family.positions(base, rows),
        # the decoder with deepstack has one kind of layer and takes its mask bare
        attention_mask=masks["full_attention"] if stacked else masks,
        use_cache=False,
        **(deepstack(rows) if stacked else {}),
    )
    at, columns = predicted_tokens(batch.loss_mask)
    return output.last_hidden_state[at, columns - 1], rows.input_ids[at, columns]


def logprobs_of(
    model: nn.Module, family: Family, rows: list[EncodedRow], *, temperature: float, **options
) -> Tensor:
    """Return the log-probabilities [N,T] of the completions, 0 outside their masks."""
    batch = plain_batch(rows, pad_token_id=0)
    hidden, targets = hidden_states(model, family, batch)
    values, _ = token_logprobs(
        hidden,
        lm_head_weight(model),
        targets,
        temperature=temperature,
        softcap=logit_softcap(model),
        **options,
    )
    return values.new_zeros(batch.completion_mask.shape).masked_scatter(
        batch.completion_mask, values
    )


@torch.no_grad()
def sampled(
    policy: Policy, prompt: EncodedPrompt, uniform: Tensor, sampling: SamplingConfig
) -> Completion:
    """Sample one completion with a whole forward for every token, and a nucleus found by sorting.

    uniform [T]: the numbers that it is drawn by.
    """
    ids, logprobs, masses = [], [], []
    stopped = False
    while not stopped and len(ids) < sampling.max_completion_length:
        tokens = torch.tensor([*ids, 0])  # the last one stands for the token that is asked for
        asked = torch.arange(len(tokens)) == len(ids)
        hidden, _ = hidden_states(
            policy.net, policy.family, plain_batch([EncodedRow(prompt, tokens, asked)], 0)
        )
        logits = (hidden.to(policy.head.dtype) @ policy.head.t())[0].float()
        if (softcap := logit_softcap(policy.net)) is not None:
            logits = softcap * (logits / softcap).tanh()
        logits[list(policy.base.suppressed_ids)] = -torch.inf
        row = (logits / (sampling.temperature or 1.0)).log_softmax(0)
        if sampling.temperature > 0:
            order = row.sort(descending=True, stable=True).indices
            size = int((row.exp()[order].cumsum(0) < sampling.top_p).sum()) + 1
            kept = torch.zeros_like(row).scatter(0, order[:size], row.exp()[order[:size]])
            mass = kept.sum()
            token = int((kept.cumsum(0) <= uniform[len(ids)] * mass).sum())
        else:
            token, mass = int(row.argmax()), torch.tensor(1.0)
        ids.append(token)
        logprobs.append(row[token])
        masses.append(mass)
        stopped = token in policy.base.stop_ids
    return Completion(torch.tensor(ids), torch.stack(logprobs), torch.stack(masses), not stopped)
