"""Decode one token of every row: two functions of tensors that stay where they are.

`DecodingStep.draw` turns the states at hand into tokens and records them. `DecodingStep.read` runs
the decoder on these tokens and leaves the next states. Both read and write the buffers of
`DecodingBuffers` in place. No number of theirs comes from Python but the shapes. So each can be
captured once for a shape as a CUDA graph and replayed for every token (engine/graphs.py). On a CPU
the same functions run as they are. Which completions are decoded is engine/generate.py's business.

What a GPU is good at differs from what a CPU is good at, so STEPS says by device in what steps the
shapes change. On a CPU every token has exactly the lengths and rows that it needs. On a GPU lengths
grow in steps, and completions that have finished are decoded on, their tokens unused, until enough
have finished for the next smaller size.

Shapes: N completions, n rows that are decoded, T room for the longest completion, B prompts of S
tokens with W completions each in the cache, Q tokens whose masks are made together, R length of
the longest completion that is decoded, rounded up. K key-value heads, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cache import DecodingMask, SamplingCache
from engine.completion import SamplingConfig
from engine.families import language_model, unwrapped
from engine.forward import read_tokens
from engine.logprobs import scaled_logits
from engine.nucleus import draw
from engine.policy import Policy

MASKS_AHEAD = 8  # the masks of this many coming tokens are made together


@dataclass(frozen=True)
class DecodingSteps:
    """Say in what steps the shapes of decoding change.

    look_every: finished rows are looked for every so many tokens, because each look waits for the
        device.
    length: lengths of prompts and completions are rounded up to multiples of this.
    sizes: shares of the rows at the start. Rows are dropped when one of these numbers holds all
        that go on. () to drop each row as soon as it is seen to have finished.
    graphs: whether a shape that comes again is captured as a CUDA graph.
    """

    look_every: int
    length: int
    sizes: tuple[float, ...]
    graphs: bool

    def rounded(self, tokens: int) -> int:
        """Round a length up."""
        return -(-tokens // self.length) * self.length


# For 512 tokens that is 8 lengths on a GPU, and at most 3 changes of size.
STEPS = {
    "cpu": DecodingSteps(look_every=1, length=1, sizes=(), graphs=False),
    "cuda": DecodingSteps(look_every=8, length=64, sizes=(1 / 2, 1 / 4, 1 / 8), graphs=True),
}


def steps_on(device: torch.device) -> DecodingSteps:
    """Find in what steps shapes change on a device."""
    return STEPS.get(device.type, STEPS["cpu"])


@dataclass(frozen=True)
class Room:
    """Say how large the buffers are: N completions, and in the cache B prompts of S tokens, with W
    completions of T tokens each.
    """

    completions: int
    prompts: int
    prompt_length: int
    generations: int
    completion_length: int


class DecodingBuffers:
    """Hold all that decoding reads and writes, at addresses that stay.

    cache: keys and values.
    prompt_mask [B,S] bool, prompt_positions [B] int64: of the prompts in the cache, which places
        hold a token, and the position id of the first token after it.
    ids [N,T] int64, logprobs, masses and uniform [N,T] fp32: of every completion, what is recorded
        and the numbers that it is drawn by.
    completions, places, offsets, positions, tokens [B x W] int64: of every row, its completion, its
        place in the cache, how many tokens it has, the position id and the id of the newest.
    stopped, broken [B x W] bool: rows that have drawn a stop token, or from logits that are not
        finite.
    hidden [B x W,H]: the states that predict the next tokens.
    cells [B x W,K] int64: `SamplingCache.cells`.
    suppressed, stops int64: the model's ids that are never drawn, and those that end a completion.
    tick [1] int64: which of the Q masks is the next token's.
    additive {kind of layer: [Q,B x W,S+T]}: those masks, cell by cell, as numbers to add.

    Of what there is for every row, the first n are in use.
    """

    def __init__(self, policy: Policy, room: Room):
        """Allocate them. The states and the cache are allocated with the first prompts."""
        self.room, device = room, policy.device
        rows = room.prompts * room.generations
        recorded = room.completions, room.completion_length
        self.cache = SamplingCache(
            room.prompts, room.prompt_length, room.generations, room.completion_length
        )
        self.prompt_mask = torch.zeros(
            room.prompts, room.prompt_length, dtype=torch.bool, device=device
        )
        self.prompt_positions = torch.zeros(room.prompts, dtype=torch.long, device=device)
        self.ids = torch.zeros(recorded, dtype=torch.long, device=device)
        self.logprobs, self.masses, self.uniform = torch.zeros(3, *recorded, device=device)
        self._rows = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.completions, self.places, self.offsets = self._rows
        self.positions, self.tokens = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.found = torch.zeros(2, rows, dtype=torch.bool, device=device)
        self.stopped, self.broken = self.found
        self.suppressed = torch.tensor(policy.base.suppressed_ids, dtype=torch.long, device=device)
        self.stops = torch.tensor(sorted(policy.base.stop_ids), device=device)
        self.tick = torch.zeros(1, dtype=torch.long, device=device)
        self.hidden = self.cells = torch.zeros(0, device=device)
        self.additive = self._no_masks(policy, rows)

    def _no_masks(self, policy: Policy, rows: int) -> dict[str, Tensor]:
        """Make the masks' numbers. Kinds of layers that see the same at any length share them."""
        size = self.room.prompt_length + self.room.completion_length
        net, device = policy.net, policy.device
        seen = policy.family.attention_masks(
            unwrapped(net),
            torch.ones(1, size, dtype=torch.bool, device=device),
            torch.zeros(1, size, dtype=torch.long, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        dtype = language_model(net).dtype
        once = {
            id(mask): torch.zeros(MASKS_AHEAD, rows, size, dtype=dtype, device=device)
            for mask in seen.values()
        }
        return {kind: once[id(mask)] for kind, mask in seen.items()}

    @property
    def recorded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, logprobs, masses)."""
        return self.ids, self.logprobs, self.masses

    def begin(self, uniform: Sequence[Tensor] | None) -> None:
        """Begin a call. uniform: for each prompt the numbers [G,T] of its completions."""
        self.cache.clear()
        self.masses.fill_(1)
        if uniform is not None:
            numbers = torch.cat(list(uniform))
            self.uniform[:, : numbers.shape[1]] = numbers.to(self.uniform.device)

    def keep_states(self, states: Tensor) -> None:
        """Let the first rows have these states [n,H]."""
        if not len(self.hidden):
            rows = len(self.tokens)
            self.hidden = states.new_zeros(rows, states.shape[1])
            self.cells = self.tokens.new_zeros(rows, self.cache.heads)
        self.hidden[: len(states)] = states

    def arrange(self, rows: list[tuple[int, int, int]]) -> None:
        """Let the first rows be these: (completion, place in the cache, tokens that it has)."""
        count = len(rows)
        if not count:
            return
        self._rows[:, :count] = torch.tensor(rows, device=self._rows.device).t()
        places = self.places[:count]
        self.found[:, :count] = False
        self.positions[:count] = (
            self.prompt_positions[places // self.cache.generations] + self.offsets[:count]
        )
        self.cells[:count] = self.cache.cells(places)

    def make_masks(self, policy: Policy, rows: int, size: int, length: int) -> None:
        """Make the masks of the next Q tokens of the first rows together, which is cheaper.

        size: a row sees its prompt's last so many places. length: rows have at most so many tokens
        in these masks.
        """
        ahead = torch.arange(MASKS_AHEAD, device=self.tokens.device)
        # A row that has finished at the greatest length stays there.
        offsets = (self.offsets[:rows, None] + ahead).clamp(max=length - 1)  # [n,Q]
        places = self.places[:rows]
        prompts = self.prompt_mask[places // self.cache.generations, -size:]  # [n,S]
        whole = torch.cat([prompts, prompts.new_ones(rows, length)], 1)  # [n,S+R]
        text = torch.zeros_like(whole, dtype=torch.long)
        seen = policy.family.attention_masks(unwrapped(policy.net), whole, text, size + offsets)
        for kind, into in {id(into): (kind, into) for kind, into in self.additive.items()}.values():
            numbers = into.new_zeros(seen[kind][:, 0].shape).masked_fill_(
                ~seen[kind][:, 0], -torch.inf
            )  # [n,Q,S+R]
            into[:, :, : size + length].index_copy_(1, places, numbers.transpose(0, 1))
        self.tick.zero_()


class DecodingStep:
    """Decode a token of the first rows of the buffers.

    head(states [n,H]) -> [n,V]: the product with the language-model head.
    """

    def __init__(
        self,
        policy: Policy,
        head: Callable[[Tensor], Tensor],
        sampling: SamplingConfig,
        buffers: DecodingBuffers,
    ):
        self.policy, self.head, self.sampling, self.buffers = policy, head, sampling, buffers

    def draw(self, rows: int) -> None:
        """Draw a token for each row, and record it with its log-probability."""
        of = self.buffers
        at = of.completions[:rows], of.offsets[:rows]
        temperature = self.sampling.temperature or 1.0
        tempered = scaled_logits(
            self.head(of.hidden[:rows]), temperature, of.suppressed, self.policy.softcap
        ).log_softmax(1)  # [n,V]
        if self.sampling.temperature > 0:
            tokens, mass = draw(tempered, self.sampling.top_p, of.uniform[at])
            of.masses[at] = mass.float()
        else:
            tokens = tempered.argmax(1)
        of.tokens[:rows] = of.ids[at] = tokens
        chosen = tempered.gather(1, tokens[:, None])[:, 0].float()
        of.logprobs[at] = chosen
        of.stopped[:rows] |= torch.isin(tokens, of.stops)
        # one NaN or infinity among a row's logits makes all its log-probabilities NaN
        of.broken[:rows] |= chosen.isnan()

    def read(self, rows: int, size: int, length: int) -> None:
        """Run the decoder on each row's newest token.

        size: rows see the last so many places of their prompts. length: and the first so many of
        their own.
        """
        of = self.buffers
        offsets, positions = of.offsets[:rows], of.positions[:rows]
        of.hidden[:rows] = read_tokens(
            self.policy.net,
            self.policy.family,
            of.tokens[:rows],
            positions,
            self._masks(rows, size, length),
        )
        # A row that has finished at the greatest length stays there.
        offsets.add_(1).clamp_(max=of.room.completion_length - 1)
        positions.add_(1)
        of.tick.add_(1)

    def _masks(self, rows: int, size: int, length: int) -> dict[str, DecodingMask]:
        """Take the next token's masks from those that were made."""
        of = self.buffers
        cells = of.cells[:rows]
        places = (cells * of.room.completion_length + of.offsets[:rows, None]).flatten()
        prompts, generations = of.cache.grid
        once: dict[int, DecodingMask] = {}
        for numbers in of.additive.values():
            if id(numbers) not in once:
                own = numbers[:, : prompts * generations, : size + length]
                additive = own.index_select(0, of.tick).view(prompts, 1, generations, 1, -1)
                once[id(numbers)] = DecodingMask(
                    of.cache, cells.flatten(), places, size, length, additive
                )
        return {kind: once[id(numbers)] for kind, numbers in of.additive.items()}
