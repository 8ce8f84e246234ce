"""Lists of encoded prompts and rows -> batches.

Prompts are padded on the left, for the sampler and for training alike. A training batch holds every
distinct prompt once, beside its completions, and says where each token stands in the one unpadded
row that the forward runs: the prompts' tokens, then the completions'.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.encode import EncodedPrompt, EncodedRow

# How long a bucket's shortest completion is at least, by its longest. On a CPU, where a bucket
# costs next to nothing, ragged groups of 4 and 8 would take 1.14 and 1.13 times as long in one
# bucket (tests/benchmarks/attention_layouts.py); nothing was measured on a GPU.
SIMILAR = 0.75


@dataclass(frozen=True)
class Prompts:
    """B prompts of S places, all ending in the last one.

    input_ids, token_types [B,S] int64; attention_mask [B,S] bool, false on padding. vision: of each
    prompt, see EncodedPrompt. alike: whether all have the same token types, so that they are
    attended to in the same way.
    """

    input_ids: Tensor
    token_types: Tensor
    attention_mask: Tensor
    vision: list[dict[str, Tensor]]
    alike: bool = False

    def to(self, device: torch.device | str) -> Prompts:
        vision = [
            {name: tensor.to(device, non_blocking=True) for name, tensor in image.items()}
            for image in self.vision
        ]
        return replace(_moved(self, device), vision=vision)


@dataclass(frozen=True)
class Bucket:
    """n completions of similar lengths, which are laid out together where tokens meet: rows [n],
    which of the batch's they are; prompts [n], of each; places [m], of their tokens in the flat
    [n,length]; all int64.
    """

    rows: Tensor
    prompts: Tensor
    places: Tensor
    length: int

    def to(self, device: torch.device | str) -> Bucket:
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """N completions, at most T tokens long, of B distinct prompts.

    completion_ids [N,T] int64, padded on the right; completion_mask [N,T] bool, true on the tokens
    that are predicted and scored. prompt_of_row [N]. Of a completion only the tokens before its
    last scored one are read: read_mask [N,R] bool.

    The packed row has M tokens: the prompts', then the completions', bucket by bucket, the longest
    first; completions of which nothing is read are in no bucket. prompt_places and read_places: of
    its tokens in the flat [B,S] and [N,R]. For the scored tokens, completion by completion:
    scored_places [K], in the flat [N,T], and predictors [K], the packed token before each. All
    int64.
    """

    prompts: Prompts
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
        return replace(
            _moved(self, device),
            prompts=self.prompts.to(device),
            buckets=[bucket.to(device) for bucket in self.buckets],
        )


def collate_rows(rows: list[EncodedRow], pad_token_id: int) -> Batch:
    """Prompt + completion of every row; rows with the same prompt object share it."""
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
    # [N] completions' tokens
    before = (
        torch.zeros_like(read_lengths).index_copy(0, order, read_lengths[order].cumsum(0))
        - read_lengths
    )
    start = int(last[-1]) + 1 + before  # [N]: each completion's first
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


def collate_prompts(prompts: list[EncodedPrompt], pad_token_id: int) -> Prompts:
    """Prompts alone, padded on the left so that all end where the first sampled token goes.

    Raises ValueError where an image has more or fewer features than its prompt has placeholders.
    """
    # here, on the CPU: on a GPU counting them would wait for all that it is still to do
    for prompt in prompts:
        placeholders, features = int(prompt.token_types.sum()), prompt.vision.get("features")
        if features is not None and len(features) != placeholders:
            raise ValueError(
                f"{placeholders} image placeholders for {len(features)} image features; the image"
                " processor and the model disagree"
            )
    return Prompts(
        input_ids=_pad_left([prompt.input_ids for prompt in prompts], pad_token_id),
        token_types=_pad_left([prompt.token_types for prompt in prompts], 0),
        attention_mask=_pad_left(
            [torch.ones(len(prompt.input_ids), dtype=torch.bool) for prompt in prompts], False
        ),
        vision=[prompt.vision for prompt in prompts],
        alike=all(torch.equal(prompt.token_types, prompts[0].token_types) for prompt in prompts),
    )


def plan_batches(rows: list[EncodedRow], size: int, max_tokens: int | None) -> list[list[int]]:
    """Indices of the rows of every batch, in order: at most `size` rows that cost at most
    `max_tokens` tokens, each distinct prompt once a batch. A row that costs more than that is a
    batch of its own.
    """
    batches: list[list[int]] = []
    seen, tokens = set(), 0
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
    """(completions in the order of their lengths [N], the longest first; those with tokens in
    buckets)
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
    """Distinct prompt objects in order of first appearance, and the index among them of every row's
    [N].
    """
    index: dict[int, int] = {}
    distinct: list[EncodedPrompt] = []
    for prompt in prompts:
        if id(prompt) not in index:
            index[id(prompt)] = len(distinct)
            distinct.append(prompt)
    return distinct, torch.tensor([index[id(prompt)] for prompt in prompts])


def _pad_left(sequences: list[Tensor], value: int | bool) -> Tensor:
    """[B,S]; padded to the longest."""
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def _moved(batch, device: torch.device | str):
    """A dataclass with all its own tensors on `device`; a GPU gets them when its work so far is
    done, without a wait here.
    """
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: value.to(device, non_blocking=True)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        },
    )
