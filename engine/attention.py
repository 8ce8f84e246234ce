"""Attention of completions that share their prompts.

A forward of training runs tokens in one row without padding: every prompt once, then the
completions. All that works on single tokens (projections, MLP, norms) therefore costs what the
tokens cost. Attention is the one place where tokens meet: here they are laid out by prompts [B,S]
and completions, those of similar lengths together [N,R], prompts attend to themselves, and each
completion attends to its prompt and to itself, so that neither G copies of a prompt nor blocks
between completions are ever computed.

What the tokens of a row see travels to the layers in place of a mask tensor and brings its way to
attend: SharedPromptMask here, engine/cache.py's while sampling. With an ordinary mask
(transformers' own forward) the attention is transformers' SDPA.

On CUDA, as far as torch's sources tell, not measured: flash attention takes no mask, the
memory-efficient kernel takes one of the queries' dtype to add, whose rows begin at multiples of 8
elements, and as many heads of queries as of keys. Both calls here meet that in fp32, fp16 and bf16,
so nothing of [heads,S,S] is made; a mask laid out otherwise would be copied anew in every layer. A
causal prompt without padding could do without a mask, which halves its attention: at 600 tokens
that is about 2 % of a prompt's work, and needs a second layout of the heads, so it is not done.

Shapes: B prompts of S places, N completions of R places, M tokens in the row, H heads, K heads of
keys and values, D a head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.collate import Bucket

IMPLEMENTATION = "shared_prompt"  # name of `attention` for transformers
ALIGNMENT = 8  # elements, of CUDA's memory-efficient kernel


class PackedMask:
    """What the tokens of a packed row see, in place of a mask tensor."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        """query [1,H,M,D], key and value [1,K,M,D] -> [1,M,H,D]. module: the layer's attention."""
        raise TypeError("use a subclass")


@dataclass(frozen=True)
class Places:
    """Where the tokens of a packed row stand: the flat places of the prompts' tokens in [B,S],
    int64 and ascending; the completions' buckets, whose tokens follow one after the other.
    """

    prompts: Tensor
    prompt_shape: tuple[int, int]
    buckets: Sequence[Bucket] = ()


@dataclass
class SharedPromptMask(PackedMask):
    """What the tokens of a packed row see in one kind of layer, true = sees. prompts [B,1,S,S]: its
    own prompt's tokens; completions [N,1,R,S+R], of all: the prompt's, then its own. Where all B,
    or N, are the same, it can be one. keep(layer, keys, values): told those of the prompts,
    [B,S,K,D] each.
    """

    places: Places
    prompts: Tensor
    completions: Tensor | None = None
    keep: Callable[[int, Tensor, Tensor], None] | None = None
    _additive: dict[tuple, list[Tensor]] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        places = self.places
        prompt_mask, *bucket_masks = self.additive(query.dtype, query.shape[1] // key.shape[1])
        split = len(places.prompts), *(len(bucket.places) for bucket in places.buckets)
        # (q, k, v) [m,heads,D]
        prompts, *completions = zip(
            *(states[0].transpose(0, 1).split(split) for states in (query, key, value))
        )
        # [B,S,heads,D]
        q, k, v = (spread(states, places.prompts, places.prompt_shape) for states in prompts)
        if self.keep is not None:
            self.keep(module.layer_idx, k, v)
        # [m,H,D]
        outputs = [gather(attend(q, k, v, prompt_mask, dropout, scaling), places.prompts)]
        for bucket, states, mask in zip(places.buckets, completions, bucket_masks):
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
        return torch.cat(outputs)[None]

    def additive(self, dtype: torch.dtype, repeats: int) -> list[Tensor]:
        """The prompts' mask and every bucket's as numbers to add, repeated for the heads that share
        a key; made once for all layers, which keep them.
        """
        if (dtype, repeats) not in self._additive:
            masks, size = [self.prompts], self.places.prompt_shape[1]
            for bucket in self.places.buckets:
                of_rows = (
                    self.completions
                    if len(self.completions) == 1
                    else self.completions[bucket.rows]
                )
                masks.append(of_rows[:, :, : bucket.length, : size + bucket.length])
            self._additive[dtype, repeats] = [additive_mask(mask, dtype, repeats) for mask in masks]
        return self._additive[dtype, repeats]


def additive_mask(mask: Tensor, dtype: torch.dtype, repeats: int) -> Tensor:
    """[R,1,Q,T] bool -> [R,1,repeats x Q,T] of `dtype`: 0 where a query sees, else -inf. Rows begin
    at multiples of ALIGNMENT.
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
    reason="its shapes change with every batch, and all of it is a few large kernels"
)
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords,
) -> tuple[Tensor, None]:
    """query [1,H,M,D], key and value [1,K,M,D] -> ([1,M,H,D], None), as transformers' layers call
    it.
    """
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    return (
        attention_mask.attend(
            module,
            query,
            key,
            value,
            dropout,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
        ),
        None,
    )


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """query [R,Q,H,D], key and value [R,T,K,D], mask [R or 1,1,H/K x Q,T] to add -> [R,Q,H,D].

    The heads that share a key are more queries of it, so keys and values are not repeated for them.
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
    """[m,...] -> [*shape,...]: each token at its place, zeros elsewhere."""
    if len(places) == shape[0] * shape[1]:
        return tokens.unflatten(0, shape)
    return (
        tokens.new_zeros(shape[0] * shape[1], *tokens.shape[1:])
        .index_copy(0, places, tokens)
        .unflatten(0, shape)
    )


def gather(padded: Tensor, places: Tensor) -> Tensor:
    """[B,S,...] -> [m,...]: the tokens at `places` of the flat rows."""
    flat = padded.flatten(0, 1)
    return flat if len(places) == len(flat) else flat.index_select(0, places)
