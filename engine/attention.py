"""Attend from completions to the prompt that they share, without copying it.

A training forward runs its tokens packed: one row without padding that holds every prompt once and
then the completions. Everything that works on single tokens (projections, MLP, norms) therefore
costs what the tokens cost. Attention is the one place where tokens meet. Here the prompts are laid
out as [B,S], and completions of similar lengths are laid out together as [N,R]. Prompts attend to
themselves. Each completion attends to its prompt and to itself. So neither G copies of a prompt nor
attention between two completions is ever computed.

A PackedMask says what the tokens of the packed row see. It travels through the layers in place of a
mask tensor and does the attention itself: SharedPromptMask (here) in training and for prefill,
DecodingMask (engine/cache.py) for decoding. With an ordinary mask tensor, as in transformers' own
forward, the attention is transformers' SDPA.

On CUDA (read in torch's sources, not measured): flash attention takes no mask. The memory-efficient
kernel takes a mask to add, in the queries' dtype, whose rows begin at multiples of 8 elements, and
it needs as many query heads as key heads. Both calls of this module meet that in fp32, fp16 and
bf16, so no [heads,S,S] tensor is made. A mask with another layout would be copied in every layer. A
causal prompt without padding needs no mask, which would halve its attention. At 600 tokens that is
about 2 % of a prompt's work and needs a second layout of the heads, so it is not done.

Shapes: B prompts of S tokens, N completions of R tokens (both padded), M tokens in the packed row,
H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.collate import Bucket

IMPLEMENTATION = "shared_prompt"  # the name under which transformers finds `attention`
ALIGNMENT = 8  # elements: mask rows begin at multiples, as CUDA's memory-efficient kernel needs


class PackedMask:
    """Say what the tokens of a packed row see, in place of a mask tensor, and attend so."""

    # A decoder that makes its mask itself asks a mask that it is given for these first, and then
    # `mask_maker` below. No mask tensor has these.
    ndim, shape = 0, (0,)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        """Attend from all tokens of the packed row, as one layer does.

        layer: its index.
        query [M,H,D], key and value [M,K,D]: the packed row.
        Returns [M,H,D].
        """
        raise TypeError("use a subclass")


@dataclass(frozen=True)
class Places:
    """Say where the tokens of a packed row belong in the padded layouts.

    prompts int64, ascending: flat index in [B,S] of each prompt token
    prompt_shape: (B, S).
    buckets: completions of similar lengths, whose tokens follow bucket after bucket.
    """

    prompts: Tensor
    prompt_shape: tuple[int, int]
    buckets: Sequence[Bucket] = ()


@dataclass
class SharedPromptMask(PackedMask):
    """Hold what the tokens of a packed row see in one kind of layer (True = sees).

    prompts [B,1,S,S] bool: each prompt sees its own tokens.
    completions [N,1,R,S+R] bool: each completion sees its prompt's tokens, then its own.
    keep(layer, keys, values): called with the prompts' keys and values, [B,S,K,D] each.

    Where all B prompts (or all N completions) see the same, the first dimension may be 1.
    """

    places: Places
    prompts: Tensor
    completions: Tensor | None = None
    keep: Callable[[int, Tensor, Tensor], None] | None = None
    _additive: dict[tuple[torch.dtype, int], list[Tensor]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        """Attend within the prompts, then from each bucket to its prompts and itself."""
        places = self.places
        prompt_mask, *bucket_masks = self.additive(query.dtype, query.shape[1] // key.shape[1])
        split = len(places.prompts), *(len(bucket.places) for bucket in places.buckets)
        # q, k and v of the prompts, then of each bucket: [m,heads,D]
        prompts, *completions = zip(
            *(states.split(split) for states in (query, key, value)), strict=True
        )
        # [B,S,heads,D]
        q, k, v = (spread(states, places.prompts, places.prompt_shape) for states in prompts)
        if self.keep is not None:
            self.keep(layer, k, v)
        # one [m,H,D] for the prompts and for each bucket
        outputs = [gather(attend(q, k, v, prompt_mask, dropout, scaling), places.prompts)]
        for bucket, states, mask in zip(places.buckets, completions, bucket_masks, strict=True):
            # [n,R,heads,D]
            own_q, own_k, own_v = (
                spread(part, bucket.places, (len(bucket.rows), bucket.length)) for part in states
            )
            keys, values = (
                torch.cat([of_prompts.index_select(0, bucket.prompts), own], 1)
                for of_prompts, own in ((k, own_k), (v, own_v))
            )
            outputs.append(
                gather(attend(own_q, keys, values, mask, dropout, scaling), bucket.places)
            )
        return torch.cat(outputs)

    def additive(self, dtype: torch.dtype, repeats: int) -> list[Tensor]:
        """Return the masks to add to the scores: the prompts', then one for each bucket.

        They are repeated for the `repeats` query heads that share a key head. They are made once
        for all layers, because the layers keep them for the backward pass.
        """
        if (dtype, repeats) not in self._additive:
            masks, size = [self.prompts], self.places.prompt_shape[1]
            for bucket in self.places.buckets:
                assert self.completions is not None, "completions need a mask"
                of_rows = (
                    self.completions
                    if len(self.completions) == 1
                    else self.completions[bucket.rows]
                )
                masks.append(of_rows[:, :, : bucket.length, : size + bucket.length])
            self._additive[dtype, repeats] = [additive_mask(mask, dtype, repeats) for mask in masks]
        return self._additive[dtype, repeats]


def additive_mask(mask: Tensor, dtype: torch.dtype, repeats: int) -> Tensor:
    """Turn a bool mask into numbers to add to the scores: 0 where a query sees a key, else -inf.

    mask [R,1,Q,T] bool.
    Returns [R,1,repeats x Q,T] of `dtype`, whose rows begin at multiples of ALIGNMENT elements.
    """
    rows, _, queries, keys = mask.shape
    padded = torch.zeros(
        rows,
        1,
        repeats,
        queries,
        -(-keys // ALIGNMENT) * ALIGNMENT,
        dtype=dtype,
        device=mask.device,
    )
    return padded[..., :keys].masked_fill_(~mask[:, :, None], -torch.inf).flatten(2, 3)


@torch.compiler.disable(
    reason="its shapes change with every batch, and it consists of a few large kernels"
)
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' layers ask: by a PackedMask where there is one, else by SDPA.

    query [1,H,M,D], key and value [1,K,M,D].
    Returns ([1,M,H,D], None).
    """
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx  # torch types any attribute as Tensor or Module
    return attention_mask.attend(layer, q, k, v, dropout, scaling)[None], None


def mask_maker(
    attention_mask: PackedMask | Tensor | None = None, **keywords: Any
) -> PackedMask | Tensor | None:
    """Make a decoder's mask as for SDPA, and leave a PackedMask as it is."""
    if isinstance(attention_mask, PackedMask):
        return attention_mask
    return sdpa_mask(attention_mask=attention_mask, **keywords)


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask_maker)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Attend in padded rows, without copying keys and values for the query heads that share them.

    query [R,Q,H,D], key and value [R,T,K,D].
    mask [R or 1,1,H/K x Q,T]: numbers to add to the scores.
    Returns [R,Q,H,D]. The H/K query heads of a key head are handled as more queries of that head.
    """
    rows, length, heads, width = query.shape
    shared = key.shape[2]
    # [R,K,H/K x Q,D]
    query = query.unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4).reshape(rows, shared, -1, width)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return (
        output.view(rows, shared, heads // shared, length, width)
        .permute(0, 3, 1, 2, 4)
        .reshape(rows, length, heads, width)
    )


def spread(tokens: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Lay out packed tokens in padded rows, with zeros elsewhere.

    tokens [m,...], places [m] int64: the tokens and the flat index of each in `shape`.
    Returns [*shape,...].
    """
    if len(places) == shape[0] * shape[1]:
        return tokens.unflatten(0, shape)
    return (
        tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:])
        .index_copy(0, places, tokens)
        .unflatten(0, shape)
    )


def gather(padded: Tensor, places: Tensor) -> Tensor:
    """Collect the tokens at `places` of padded rows [B,S,...] into one packed row [m,...]."""
    flat = padded.flatten(0, 1)
    return flat if len(places) == len(flat) else flat.index_select(0, places)
