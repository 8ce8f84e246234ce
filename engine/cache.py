"""Keep the keys and values that the sampler needs, and attend from new tokens to them.

The KV cache holds a prompt's keys and values once for all its completions. The G new tokens of a
prompt are G times as many queries of the same keys, so the prompt is neither copied nor read G
times. Each completion has room of its own, allocated at the start for the longest completion.
Everything that works on single tokens (projections, MLP, norms) sees one packed row: the tokens
that are being decoded, without padding.

Shapes: B prompts of S tokens (padded on the left), W completions for each prompt, with room for T
tokens each, of which R are in use. n new tokens, one for each completion that is being decoded.
H query heads, K key-value heads, h = H / K, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import AttentionLayer, PackedMask, gather, spread


@dataclass
class LayerCache:
    """Hold one layer's keys and values.

    prompt_keys, prompt_values [B,K,S,D]: prompts, padded on the left.
    keys, values [B x W,K,T,D]: completions.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class SamplingCache:
    """Hold the keys and values of all layers while completions are decoded.

    num_prompts: B.
    prompt_length: S, the length of the longest prompt.
    generations: W, the number of completions of each prompt.
    completion_length: T, the length of the longest completion.
    """

    def __init__(
        self, num_prompts: int, prompt_length: int, generations: int, completion_length: int
    ):
        self.num_prompts, self.generations = num_prompts, generations
        self.prompt_length, self.completion_length = prompt_length, completion_length
        self.layers: dict[int, LayerCache] = {}

    def keep_prompts(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write the keys and values of prompts that one layer has just read.

        keys, values [b,s,K,D]: prompts padded on the left, s <= S.
        slots [b] int64: index of each prompt in the cache.
        """
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
        # Zeros, because an unused place has weight 0 and 0 x NaN would be NaN.
        return LayerCache(*(like.new_zeros(shape) for shape in (prompts, prompts, rows, rows)))

    def select(self, prompts: Tensor, rows: Tensor) -> None:
        """Keep only these prompts and completions, in this order, and free the rest.

        prompts [b] int64, rows [b x w] int64: their indices in the cache.
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
    """Say what n new tokens see in one kind of layer, and attend so.

    A new token sees the last `prompt_length` places of its prompt and the first `length` places of
    its own completion, where it is the last token.

    rows [n] int64: index of each completion in the cache.
    offsets [n] int64: place of each new token in its completion.
    additive [B,W,1,1,S+R]: numbers to add to the scores, 0 where a token sees, else -inf.
        Completions without a new token see everything, and their result is not used.
    """

    cache: SamplingCache
    rows: Tensor
    offsets: Tensor
    prompt_length: int
    length: int
    additive: Tensor

    def attend(
        self,
        module: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        """Add the new keys and values to the cache, then attend to prompts and completions."""
        cache, kept = self.cache, self.cache.layers[module.layer_idx]
        grid, repeats = (cache.num_prompts, cache.generations), query.shape[1] // key.shape[1]
        for into, new in ((kept.keys, key), (kept.values, value)):
            into[self.rows, :, self.offsets] = new[0].transpose(0, 1)  # [n,K,D]
        start = cache.prompt_length - self.prompt_length
        prompt_keys = kept.prompt_keys[:, :, start:]  # [B,K,S,D]
        prompt_values = kept.prompt_values[:, :, start:]
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
    """Put the queries of one prompt's completions together: [B,W,K,h,X] -> [B,K,W x h,X]."""
    return rows.transpose(1, 2).flatten(2, 3)


def by_row(prompts: Tensor, generations: int) -> Tensor:
    """Undo `by_prompt`: [B,K,W x h,X] -> [B,W,K,h,X]."""
    return prompts.unflatten(2, (generations, -1)).transpose(1, 2)
