"""Hidden states of a batch of completions: the one forward of training, of the reference and of teacher-forced scoring.

Today's forward is the plain one: every completion is a row with its own copy of the prompt. Callers see only hidden states
and targets, one a scored token, so a forward that runs the prompt once for all its completions can take its place.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.collate import Batch
from engine.families import Family, language_model, lm_head_weight, unwrapped
from engine.logprobs import token_logprobs


@torch.no_grad()
def image_features(model: nn.Module, family: Family, batch: Batch) -> list[Tensor]:
    """Embeddings [tokens,H] of each distinct image. The vision tower is frozen, so it runs without gradient."""
    return [family.image_features(unwrapped(model), image) for image in batch.vision]


def embed(model: nn.Module, family: Family, batch: Batch) -> Tensor:
    """Input embeddings [B,S,H] with every image's features in its placeholders."""
    features = image_features(model, family, batch)
    is_image = batch.token_types == 1  # [B,S]; by type, not by id: a sampled placeholder id would not be an image
    text_ids = batch.input_ids.masked_fill(is_image, 0)  # Gemma's placeholder id can lie outside the vocabulary
    embeddings = unwrapped(model).get_input_embeddings()(text_ids)  # [B,S,H]
    rows = torch.cat([features[i] for i in batch.image_of_row.tolist()])  # [placeholders,H], row by row
    if len(rows) != int(is_image.sum()):
        raise ValueError(
            f"{int(is_image.sum())} image placeholders for {len(rows)} image features; the image processor and the model disagree"
        )
    return embeddings.masked_scatter(is_image[..., None], rows.to(embeddings.dtype))


def completion_hidden_states(model: nn.Module, family: Family, batch: Batch) -> tuple[Tensor, Tensor]:
    """(hidden [M,H], targets [M]): for each of the M tokens under `loss_mask`, row by row, the state that predicts it, and
    its id.
    """
    base = unwrapped(model)
    output = language_model(model)(
        inputs_embeds=embed(model, family, batch),
        position_ids=family.positions(base, batch),
        attention_mask=family.attention_masks(base, batch.attention_mask, batch.token_types, batch.input_ids.shape[1]),
        use_cache=False,
    )
    rows, columns = predicted_tokens(batch.loss_mask)
    return output.last_hidden_state[rows, columns - 1], batch.input_ids[rows, columns]


def completion_logprobs(
    model: nn.Module,
    family: Family,
    batch: Batch,
    *,
    temperature: float,
    suppress_token_ids: Sequence[int] = (),
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(logprobs [B,T], entropy [B,T] or None) of every row's completion under the active adapter; 0 outside
    `completion_mask`.
    """
    hidden, targets = completion_hidden_states(model, family, batch)  # [M,H], [M]
    head = lm_head_weight(model)  # [V,H]
    logprobs, entropies = token_logprobs(
        hidden, head, targets, temperature=temperature, suppress_token_ids=suppress_token_ids, entropy=entropy)  # [M]
    return to_rows(logprobs, batch.completion_mask), to_rows(entropies, batch.completion_mask) if entropy else None


def predicted_tokens(loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [M] of the tokens under `loss_mask` [B,S], row by row. Token t is predicted by the state at t - 1.

    The first token of a row has nothing before it and is never predicted.
    """
    shifted = loss_mask.clone()
    shifted[:, 0] = False
    return shifted.nonzero(as_tuple=True)


def to_rows(values: Tensor, completion_mask: Tensor) -> Tensor:
    """[M] values of the scored tokens, row by row -> [B,T], 0 where `completion_mask` [B,T] is false. Keeps the gradient."""
    return values.new_zeros(completion_mask.shape).masked_scatter(completion_mask, values)
