"""Keep the keys and values that the sampler needs, and attend from new tokens to them.

The KV cache holds a prompt's keys and values once for all its completions. The G new tokens of a
prompt are G times as many queries of the same keys, so the prompt is neither copied nor read G
times. Each completion has room of its own, allocated at the start for the longest completion.
Everything that works on single tokens (projections, MLP, norms) sees one packed row: the tokens
that are being decoded, without padding.

The cache is a grid of B prompts with W completions each, its cells. It is allocated once and never
moves, as a CUDA graph needs it (engine/graphs.py): a smaller grid takes the first of its places.

Shapes: B prompts of S tokens (padded on the left), W completions for each prompt, with room for T
tokens each, of which R are in use. n new tokens, one for each completion that is being decoded.
H query heads, K key-value heads, h = H / K, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.attention import PackedMask


@dataclass
class LayerCache:
    """Hold one layer's keys and values.

    prompt_keys, prompt_values [B,K,S,D]: prompts, padded on the left.
    keys, values [B x K x W,T,D]: completions.
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
    heads: K, known once a prompt is kept.
    """

    def __init__(
        self, num_prompts: int, prompt_length: int, generations: int, completion_length: int
    ):
        self._room = self.num_prompts, self.generations = num_prompts, generations
        self.prompt_length, self.completion_length = prompt_length, completion_length
        self.heads = 0
        self._whole: dict[int, LayerCache] = {}
        self.layers: dict[int, LayerCache] = {}  # the places that are in use

    @property
    def grid(self) -> tuple[int, int]:
        """Return (B, W) of the places that are in use."""
        return self.num_prompts, self.generations

    def clear(self) -> None:
        """Take all places again, for other prompts. What they hold is finite and not seen."""
        self.num_prompts, self.generations = self._room
        self.layers = {layer: replace(whole) for layer, whole in self._whole.items()}

    def keep_prompts(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write the keys and values of prompts that one layer has just read.

        keys, values [b,s,K,D]: prompts padded on the left, s <= S.
        slots [b] int64: index of each prompt in the cache.
        """
        if layer not in self._whole:
            self._whole[layer] = self._empty(keys)
            self.layers[layer] = replace(self._whole[layer])
        kept = self.layers[layer]
        start = self.prompt_length - keys.shape[1]
        kept.prompt_keys[slots, :, start:] = keys.transpose(1, 2)
        kept.prompt_values[slots, :, start:] = values.transpose(1, 2)

    def _empty(self, like: Tensor) -> LayerCache:
        self.heads, width = like.shape[2:]
        prompts = self.num_prompts, self.heads, self.prompt_length, width
        rows = self.num_prompts * self.heads * self.generations, self.completion_length, width
        # Zeros, because an unused place has weight 0 and 0 x NaN would be NaN.
        return LayerCache(*(like.new_zeros(shape) for shape in (prompts, prompts, rows, rows)))

    def cells(self, rows: Tensor) -> Tensor:
        """Find a completion's place in the grid for each of its key-value heads.

        rows [n] int64: index of each completion, prompt x W + completion.
        Returns [n,K] int64: index in [B x K x W].
        """
        heads = torch.arange(self.heads, device=rows.device)
        prompts, of_prompt = rows[:, None] // self.generations, rows[:, None] % self.generations
        return (prompts * self.heads + heads) * self.generations + of_prompt

    def select(self, prompts: Tensor, rows: Tensor) -> None:
        """Keep only these prompts and completions, in this order, as a smaller grid.

        prompts [b] int64, rows [b x w] int64: their indices in the cache.
        """
        cells = self.cells(rows).unflatten(0, (len(prompts), -1)).transpose(1, 2).flatten()
        for layer, kept in self.layers.items():
            whole, places = self._whole[layer], (prompts, prompts, cells, cells)
            for (name, tensor), index in zip(vars(kept).items(), places, strict=True):
                into = getattr(whole, name)[: len(index)]
                into.copy_(tensor.index_select(0, index))
                setattr(kept, name, into)
        self.num_prompts, self.generations = len(prompts), len(rows) // len(prompts)


@dataclass
class DecodingMask(PackedMask):
    """Say what n new tokens see in one kind of layer, and attend so.

    A new token sees the last `prompt_length` places of its prompt and the first `length` places of
    its own completion, as far as `additive` lets it.

    cells [n x K] int64: place in the grid of each completion, by head (`SamplingCache.cells`).
    places [n x K] int64: place of each new token in the cells' T places end to end.
    additive [B,1,W,1,S+R]: numbers to add to the scores, 0 where a token sees, else -inf.
        The result of a cell without a new token is not used.
    """

    cache: SamplingCache
    cells: Tensor
    places: Tensor
    prompt_length: int
    length: int
    additive: Tensor

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float,
    ) -> Tensor:
        """Add the new keys and values to the cache, then attend to prompts and completions.

        Ten kernels on a GPU. Nothing is laid out twice: both products write their part of the
        scores.
        """
        cache, kept = self.cache, self.cache.layers[layer]
        heads, width, size = *key.shape[1:], self.prompt_length
        for into, new in ((kept.keys, key), (kept.values, value)):
            into.view(-1, width).index_copy_(0, self.places, new.reshape(-1, width))
        start = cache.prompt_length - size
        prompt_keys = kept.prompt_keys[:, :, start:].flatten(0, 1)  # [B x K,S,D]
        prompt_values = kept.prompt_values[:, :, start:].flatten(0, 1)
        # [B x K x W,R,D]
        keys, values = kept.keys[:, : self.length], kept.values[:, : self.length]

        queries = self._spread(query.view(len(query), heads, -1, width), scaling)
        by_prompt, by_row = (len(prompt_keys), -1), queries.shape[:2]
        scores = queries.new_empty(*by_row, size + self.length)  # [B x K x W,h,S+R]
        of_prompts = scores.view(*by_prompt, size + self.length)  # [B x K,W x h,S+R]
        torch.bmm(
            queries.view(*by_prompt, width),
            prompt_keys.transpose(1, 2),
            out=of_prompts[..., :size],
        )
        torch.bmm(queries, keys.transpose(1, 2), out=scores[..., size:])
        in_grid = scores.view(cache.num_prompts, heads, cache.generations, *scores.shape[1:])
        in_grid += self.additive
        weights = scores.softmax(-1)
        of_prompts = weights.view(of_prompts.shape)[..., :size]
        output = torch.bmm(of_prompts, prompt_values)  # [B x K,W x h,D]
        rows = output.view(queries.shape).baddbmm_(weights[..., size:], values)
        return rows.flatten(1).index_select(0, self.cells).view(query.shape)

    def _spread(self, query: Tensor, scaling: float) -> Tensor:
        """Multiply queries [n,K,h,D] by `scaling` and lay them out by cell -> [B x K x W,h,D]."""
        prompts, generations = self.cache.grid
        heads, repeats, width = query.shape[1:]
        shape = prompts * heads * generations, repeats, width
        if len(query) == prompts * generations:  # no cell is empty
            queries = query.new_empty(shape)
            by_row = queries.view(prompts, heads, generations, repeats, width).transpose(1, 2)
            torch.mul(query.view(by_row.shape), scaling, out=by_row)
            return queries
        return query.new_zeros(shape).index_copy_(
            0, self.cells, (query * scaling).reshape(-1, repeats, width)
        )
