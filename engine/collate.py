"""Collate encoded prompts and rows into batches.

Prompts are padded on the left, for the sampler and for training alike. A training batch holds every
distinct prompt once, beside its completions, and says where each token stands in the one packed row
that the forward runs: the prompts' tokens, then the completions'.

A place is the index of a token in a padded tensor laid flat: of [B,S] for prompts, of [N,T] or
[N,R] for completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.device import on_device
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import ImageTensors

# A bucket's shortest completion is at least this part of its longest. On a CPU, where a bucket
# costs next to nothing, ragged groups of 4 and 8 would take 1.14 and 1.13 times as long in one
# bucket (tests/benchmarks/attention_layouts.py). Nothing was measured on a GPU.
SIMILAR = 0.75


@dataclass(frozen=True)
class PromptBatch:
    """Hold B prompts of S places, all ending in the last one.

    input_ids [B,S] int64: padded on the left.
    token_types [B,S] int64: 1 on image placeholders.
    attention_mask [B,S] bool: false on padding.
    vision: the tensors of each prompt's image, see EncodedPrompt.
    alike: all prompts have the same token types, so they are attended to in the same way.
    """

    input_ids: Tensor
    token_types: Tensor
    attention_mask: Tensor
    vision: list[ImageTensors]
    alike: bool = False

    def to(self, device: torch.device | str) -> PromptBatch:
        """Copy all tensors to a device."""
        vision = [
            {name: on_device(tensor, device) for name, tensor in image.items()}
            for image in self.vision
        ]
        return replace(_moved(self, device), vision=vision)


@dataclass(frozen=True)
class Bucket:
    """Hold n completions of similar lengths, which are laid out together where tokens meet.

    rows [n] int64: index of each completion in the batch.
    prompts [n] int64: index of the prompt of each.
    places [m] int64: of their tokens in the padded [n,length], laid flat.
    length: of the longest.
    """

    rows: Tensor
    prompts: Tensor
    places: Tensor
    length: int

    def to(self, device: torch.device | str) -> Bucket:
        """Copy all tensors to a device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """Hold N completions, at most T tokens long, of B distinct prompts.

    prompts: the distinct prompts.
    prompt_of_row [N] int64: index of each completion's prompt.
    completion_ids [N,T] int64: padded on the right.
    completion_mask [N,T] bool: true on the tokens that are predicted and scored.
    read_mask [N,R] bool: tokens before the last scored one, the only ones that the model reads.

    The packed row has M tokens: the prompts', then the completions', bucket by bucket, the longest
    first. Completions of which nothing is read are in no bucket.

    prompt_places [P] int64: of the packed row's P prompt tokens, in [B,S].
    read_places [M-P] int64: of its completion tokens, in [N,R].
    buckets: completions of similar lengths, in the packed order.

    The K scored tokens come completion by completion.

    scored_places [K] int64: of the scored tokens, in [N,T].
    predictors [K] int64: index in the packed row of the token before each.
    """

    prompts: PromptBatch
    prompt_of_row: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    read_mask: Tensor
    prompt_places: Tensor
    read_places: Tensor
    buckets: list[Bucket]
    scored_places: Tensor
    predictors: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Copy all tensors to a device."""
        return replace(
            _moved(self, device),
            prompts=self.prompts.to(device),
            buckets=[bucket.to(device) for bucket in self.buckets],
        )


def collate_rows(rows: list[EncodedRow], pad_token_id: int) -> Batch:
    """Collate prompt + completion of every row. Rows with the same prompt object share it."""
    distinct, prompt_of_row = _distinct_prompts([row.prompt for row in rows])
    prompts = collate_prompts(distinct, pad_token_id)
    # [N,T]
    ids = pad_sequence(
        [row.completion_ids for row in rows], batch_first=True, padding_value=pad_token_id
    )
    scored = pad_sequence([row.completion_mask for row in rows], batch_first=True)  # [N,T]
    columns = torch.arange(ids.shape[1])
    # the last scored token predicts nothing and is not read
    read_lengths = (columns * scored).amax(1)  # [N]
    read_mask = columns[: int(read_lengths.max())] < read_lengths[:, None]  # [N,R]

    order, buckets = _buckets(read_lengths, prompt_of_row)
    read_places = [
        bucket.rows[bucket.places // bucket.length] * read_mask.shape[1]
        + bucket.places % bucket.length
        for bucket in buckets
    ]
    # each prompt's last token in the packed row
    last = prompts.attention_mask.sum(1).cumsum(0) - 1  # [B]
    packed_up_to = torch.zeros_like(read_lengths)  # [N] completion tokens, its own included
    packed_up_to = packed_up_to.index_copy(0, order, read_lengths[order].cumsum(0))
    # [N] index of each completion's first token in the packed row
    start = int(last[-1]) + 1 + packed_up_to - read_lengths
    row, column = scored.nonzero(as_tuple=True)
    return Batch(
        prompts=prompts,
        prompt_of_row=prompt_of_row,
        completion_ids=ids,
        completion_mask=scored,
        read_mask=read_mask,
        prompt_places=prompts.attention_mask.flatten().nonzero()[:, 0],
        read_places=torch.cat([order[:0], *read_places]),
        buckets=buckets,
        scored_places=scored.flatten().nonzero()[:, 0],
        predictors=torch.where(column == 0, last[prompt_of_row[row]], start[row] + column - 1),
    )


def collate_prompts(prompts: list[EncodedPrompt], pad_token_id: int) -> PromptBatch:
    """Pad prompts on the left, so that all end where the first sampled token goes.

    Raises ValueError where an image has more or fewer features than its prompt has placeholders.
    """
    # Counted here, on the CPU: on a GPU counting would wait for all work that is queued.
    for prompt in prompts:
        placeholders, features = int(prompt.token_types.sum()), prompt.vision.get("features")
        if features is not None and len(features) != placeholders:
            raise ValueError(
                f"{placeholders} image placeholders for {len(features)} image features; the image"
                " processor and the model disagree"
            )
    return PromptBatch(
        input_ids=_pad_left([prompt.input_ids for prompt in prompts], pad_token_id),
        token_types=_pad_left([prompt.token_types for prompt in prompts], 0),
        attention_mask=_pad_left(
            [torch.ones(len(prompt.input_ids), dtype=torch.bool) for prompt in prompts], False
        ),
        vision=[prompt.vision for prompt in prompts],
        alike=all(torch.equal(prompt.token_types, prompts[0].token_types) for prompt in prompts),
    )


@dataclass(frozen=True)
class Rows:
    """Hold rows that are run in micro-batches, such as those of one optimizer step.

    rows: encoded. size: of a micro-batch, at most. indices: of the rows, None for 0, 1, 2 ...
    per_step: rows of an optimizer step, where there are those of several. No micro-batch has rows
    of two steps.
    """

    rows: list[EncodedRow]
    size: int
    indices: Sequence[int] | None = None
    per_step: int | None = None

    def micro_batches(self, max_tokens: int | None) -> list[list[int]]:
        """Cut the rows -> the indices of each micro-batch's rows, as `plan_batches` does."""
        step, indices = self.per_step or max(1, len(self.rows)), self._indices
        return [
            [indices[start + i] for i in batch]
            for start in range(0, len(self.rows), step)
            for batch in plan_batches(self.rows[start : start + step], self.size, max_tokens)
        ]

    def tokens(self, indices: Sequence[int]) -> int:
        """Count the tokens of a micro-batch as `plan_batches` does, each prompt once."""
        row_of = dict(zip(self._indices, self.rows, strict=True))
        rows = [row_of[i] for i in indices]
        prompts = {id(row.prompt): len(row.prompt.input_ids) for row in rows}
        return sum(prompts.values()) + sum(len(row.completion_ids) for row in rows)

    @property
    def _indices(self) -> Sequence[int]:
        return range(len(self.rows)) if self.indices is None else self.indices


def plan_batches(rows: list[EncodedRow], size: int, max_tokens: int | None) -> list[list[int]]:
    """Cut rows into batches -> the indices of each batch's rows, in order.

    size: rows of a batch at most.
    max_tokens: tokens of a batch at most, each distinct prompt counted once, or None. A row that
    has more is a batch of its own.
    """
    batches: list[list[int]] = []
    seen: set[int] = set()
    tokens = 0
    for index, row in enumerate(rows):
        cost = len(row.completion_ids) + (
            0 if id(row.prompt) in seen else len(row.prompt.input_ids)
        )
        if index % size == 0 or (max_tokens is not None and tokens + cost > max_tokens):
            batches.append([])
            seen, tokens = set(), 0
            cost = len(row.completion_ids) + len(row.prompt.input_ids)
        batches[-1].append(index)
        seen.add(id(row.prompt))
        tokens += cost
    return batches


def _buckets(lengths: Tensor, prompt_of_row: Tensor) -> tuple[Tensor, list[Bucket]]:
    """Sort completions by length -> (their order [N], the longest first, and their buckets).

    lengths [N] int64: tokens read. A completion of which nothing is read is in no bucket.
    """
    order = lengths.argsort(descending=True, stable=True)
    ordered, buckets, first = lengths[order].tolist(), [], 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] < SIMILAR * ordered[first]:
            rows, length = order[first:end], ordered[first]
            if length > 0:
                is_token = torch.arange(length) < lengths[rows, None]  # [n,length]
                buckets.append(
                    Bucket(rows, prompt_of_row[rows], is_token.flatten().nonzero()[:, 0], length)
                )
            first = end
    return order, buckets


def _distinct_prompts(prompts: list[EncodedPrompt]) -> tuple[list[EncodedPrompt], Tensor]:
    """List the distinct prompt objects in order of appearance, and each row's index in it [N]."""
    index: dict[int, int] = {}
    distinct: list[EncodedPrompt] = []
    for prompt in prompts:
        if id(prompt) not in index:
            index[id(prompt)] = len(distinct)
            distinct.append(prompt)
    return distinct, torch.tensor([index[id(prompt)] for prompt in prompts])


def _pad_left(sequences: list[Tensor], value: int | bool) -> Tensor:
    """Pad sequences [S_i] on the left to the longest -> [B,S]."""
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def _moved(batch: Any, device: torch.device | str) -> Any:
    """Copy a dataclass with all its own tensors to `device`, without a wait for a GPU's work."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: on_device(value, device)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        },
    )
