"""Lists of encoded prompts and rows -> batches.

Training rows are padded on the right, prompts for the sampler on the left. Vision tensors are held once per distinct prompt, so
the completions of one image share it.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.encode import EncodedPrompt, EncodedRow


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens over I distinct images.

    input_ids, token_types [B,S] int64; attention_mask [B,S] bool, false on padding; loss_mask [B,S] bool, true on the
    tokens that are predicted and scored; completion_mask [B,T] bool: the same, row by row, on the completion alone. vision:
    one dict per image; image_of_row [B] int64.
    """

    input_ids: Tensor
    token_types: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    completion_mask: Tensor
    vision: list[dict[str, Tensor]]
    image_of_row: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {name: getattr(self, name).to(device) for name in
                   ("input_ids", "token_types", "attention_mask", "loss_mask", "completion_mask", "image_of_row")}
        return replace(
            self, vision=[{name: tensor.to(device) for name, tensor in image.items()} for image in self.vision], **tensors
        )


def collate_rows(rows: list[EncodedRow], pad_token_id: int) -> Batch:
    """Prompt + completion of every row, padded on the right."""
    prompts, image_of_row = _distinct_prompts([row.prompt for row in rows])
    prompt_masks = [torch.zeros(len(row.prompt.input_ids), dtype=torch.bool) for row in rows]
    return Batch(
        input_ids=_pad([torch.cat([row.prompt.input_ids, row.completion_ids]) for row in rows], pad_token_id),
        token_types=_pad([torch.cat([row.prompt.token_types, torch.zeros_like(row.completion_ids)]) for row in rows], 0),
        attention_mask=_pad(
            [torch.ones(len(mask) + len(row.completion_ids), dtype=torch.bool) for mask, row in zip(prompt_masks, rows)], False
        ),
        loss_mask=_pad([torch.cat([mask, row.completion_mask]) for mask, row in zip(prompt_masks, rows)], False),
        completion_mask=_pad([row.completion_mask for row in rows], False),
        vision=[prompt.vision for prompt in prompts],
        image_of_row=image_of_row,
    )


def collate_prompts(prompts: list[EncodedPrompt], pad_token_id: int) -> Batch:
    """Prompts alone, padded on the left so that all end where the first sampled token goes."""
    distinct, image_of_row = _distinct_prompts(prompts)
    attention_mask = _pad([torch.ones(len(prompt.input_ids), dtype=torch.bool) for prompt in prompts], False, left=True)
    return Batch(
        input_ids=_pad([prompt.input_ids for prompt in prompts], pad_token_id, left=True),
        token_types=_pad([prompt.token_types for prompt in prompts], 0, left=True),
        attention_mask=attention_mask,
        loss_mask=torch.zeros_like(attention_mask),
        completion_mask=torch.zeros(len(prompts), 0, dtype=torch.bool),
        vision=[prompt.vision for prompt in distinct],
        image_of_row=image_of_row,
    )


def _distinct_prompts(prompts: list[EncodedPrompt]) -> tuple[list[EncodedPrompt], Tensor]:
    """Distinct prompt objects in order of first appearance, and the index among them of every row's [B]."""
    index: dict[int, int] = {}
    distinct: list[EncodedPrompt] = []
    for prompt in prompts:
        if id(prompt) not in index:
            index[id(prompt)] = len(distinct)
            distinct.append(prompt)
    return distinct, torch.tensor([index[id(prompt)] for prompt in prompts])


def _pad(sequences: list[Tensor], value: int | bool, left: bool = False) -> Tensor:
    """[B,S]; padded to the longest."""
    return torch.nn.utils.rnn.pad_sequence(
        sequences, batch_first=True, padding_value=value, padding_side="left" if left else "right"
    )
