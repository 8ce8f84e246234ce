"""Keys and values of the tokens that the sampler has read and written, and the attention of new
tokens to them.

A prompt's keys and values are kept once for all its completions: G new tokens of a prompt are G
times as many queries of the same keys, so neither is the prompt copied nor read G times. Each
completion has room of its own, allocated at the start for the longest. All that works on single
tokens (projections, MLP, norms) sees one row of the tokens that are being written, without padding.

Shapes: B prompts of S places, W completions each of T places, R of them in use; n new tokens, one a
row; H heads, K heads of keys and values, h = H / K, D a head's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.attention import PackedMask, gather, spread


@dataclass
class LayerCache:
    """prompt_keys, prompt_values [B,K,S,D], prompts padded on the left; keys, values [B x W,K,T,D]
    of completions.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class SamplingCache:
    """Of all layers, for `num_prompts` prompts of at most `prompt_length` tokens with `generations`
    completions of at most `completion_length` tokens each.
    """

    def __init__(
        self, num_prompts: int, prompt_length: int, generations: int, completion_length: int
    ):
        self.num_prompts, self.generations = num_prompts, generations
        self.prompt_length, self.completion_length = prompt_length, completion_length
        self.layers: dict[int, LayerCache] = {}

    def keep_prompts(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """keys, values [b,s,K,D] of prompts padded on the left go to the places `slots` [b]."""
        if layer not in self.layers:
            self.layers[layer] = self._empty(keys)
        kept = self.layers[layer]
        start = self.prompt_length - keys.shape[1]
        kept.prompt_keys[slots, :, start:] = keys.transpose(1, 2)
        kept.prompt_values[slots, :, start:] = values.transpose(1, 2)

    def _empty(self, like: Tensor) -> LayerCache:
        heads, width = like.shape[2:]
        prompts = self.num_prompts, heads, self.prompt_length, width
        rows = self.num_prompts * self.generations, heads, self.completion_length, width
        # zeros: 0 x NaN would be NaN
        return LayerCache(*(like.new_zeros(shape) for shape in (prompts, prompts, rows, rows)))

    def select(self, prompts: Tensor, rows: Tensor) -> None:
        """Keep the prompts at these places [b] and the completions at these [b x w], in their
        order.
        """
        for kept in self.layers.values():
            for name, places in (
                ("prompt_keys", prompts),
                ("prompt_values", prompts),
                ("keys", rows),
                ("values", rows),
            ):
                setattr(kept, name, getattr(kept, name).index_select(0, places))
        self.num_prompts, self.generations = len(prompts), len(rows) // len(prompts)


@dataclass
class DecodingMask(PackedMask):
    """What n new tokens, one a completion, see in one kind of layer: the last `prompt_length`
    places of their prompts and the first `length` of their own completions, this token the last of
    them.

    rows [n] int64: the completions' places in the cache; steps [n] int64: of each, the place of its
    new token; additive [B,W,1,1,S+R], to add to scores: 0 what it sees, else -inf. Places without a
    new token see everything.
    """

    cache: SamplingCache
    rows: Tensor
    steps: Tensor
    prompt_length: int
    length: int
    additive: Tensor

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        cache, kept = self.cache, self.cache.layers[module.layer_idx]
        grid, repeats = (cache.num_prompts, cache.generations), query.shape[1] // key.shape[1]
        for into, new in ((kept.keys, key), (kept.values, value)):
            into[self.rows, :, self.steps] = new[0].transpose(0, 1)  # [n,K,D]
        start = cache.prompt_length - self.prompt_length
        # [B,K,S,D]
        prompt_keys, prompt_values = (
            kept.prompt_keys[:, :, start:],
            kept.prompt_values[:, :, start:],
        )
        # [B x W,K,R,D]
        keys, values = kept.keys[:, :, : self.length], kept.values[:, :, : self.length]

        # [B,W,K,h,D]
        query = spread(query[0].transpose(0, 1) * scaling, self.rows, grid).unflatten(
            2, (-1, repeats)
        )
        of_prompts = by_prompt(query) @ prompt_keys.transpose(2, 3)  # [B,K,W x h,S]
        of_completions = query.flatten(0, 1) @ keys.transpose(2, 3)  # [B x W,K,h,R]
        # [B,W,K,h,S+R]
        scores = (
            torch.cat([by_row(of_prompts, grid[1]), of_completions.unflatten(0, grid)], -1)
            + self.additive
        )
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            query.dtype
        )
        of_prompts, of_completions = weights.split((self.prompt_length, self.length), -1)
        output = by_row(by_prompt(of_prompts) @ prompt_values, grid[1])  # [B,W,K,h,D]
        output = output + (of_completions.flatten(0, 1) @ values).unflatten(0, grid)
        return gather(output.flatten(2, 3), self.rows)[None]  # [1,n,H,D]


def by_prompt(rows: Tensor) -> Tensor:
    """[B,W,K,h,X] -> [B,K,W x h,X]: the queries of one prompt's completions together."""
    return rows.transpose(1, 2).flatten(2, 3)


def by_row(prompts: Tensor, generations: int) -> Tensor:
    """[B,K,W x h,X] -> [B,W,K,h,X]"""
    return prompts.unflatten(2, (generations, -1)).transpose(1, 2)
