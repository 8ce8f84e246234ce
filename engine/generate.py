"""Sample completions, for rollouts and for evaluation.

The sampler is written out here so that nothing else decides how completions are drawn: temperature
first, then the nucleus, then one uniform number for each row and token. Only the stop ids of the
model's generation_config are used (see engine/families.py). Suppressed ids (image tokens) have
probability 0, here as in every log-probability.

Each prompt is prefilled once and its completions share its KV cache (engine/cache.py). The uniform
numbers of a completion are given (engine/random_numbers.py). So a completion depends neither on
which others are decoded beside it nor on padding.

Shapes: N completions, n of them being decoded, T length of the longest, B prompts of S tokens,
H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from engine.collate import collate_prompts
from engine.completion import Completion, SamplingConfig, completion_mask, is_truncated
from engine.decoding import MASKS_AHEAD, DecodingBuffers, DecodingStep, Room, steps_on
from engine.encode import EncodedPrompt
from engine.forward import read_prompts
from engine.policy import Policy
from engine.runtime import StepFailed, StopRequested
from engine.sampling_layers import sampling_layers

# Places are filled again, or dropped by copying the cache, once this share of them is free.
FREE_AT = 0.25
# Prompts are prefilled this many tokens at a time: more is no faster and needs more memory.
READ_TOKENS = 2048


@torch.compiler.set_stance("force_eager")  # also with --compile: shapes differ from training's
@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    *,
    num_generations: int = 1,
    max_rows: int | None = None,
    whole_groups: bool = True,
    uniform: Sequence[Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_finished: Callable[[int, list[Completion]], None] = lambda prompt, completions: None,
    keep: bool = False,
) -> list[list[Completion]]:
    """Sample `num_generations` completions of every prompt and return them in the prompts' order.

    policy: its active adapter answers, or the base model where it has none.
    num_generations: completions of each prompt.
    max_rows: completions decoded at a time (None: all). Where a prompt's completions have finished,
        the next prompt takes their place, the longest first.
    whole_groups: decode at least the completions of one prompt at a time. Else they are parted
        where they are more than max_rows, and each part reads the prompt anew.
    uniform: for each prompt the numbers that decide its completions, [G,T] fp32 in [0, 1), with T
        the max_completion_length. Needed unless greedy.
    should_stop(): asked before every token. Once it returns True, StopRequested is raised, and the
        caller discards what is not finished.
    on_finished(i, completions): called as soon as prompt i has all its completions.
    keep: on a GPU hold the cache and the graphs afterwards, for the next call of the same shapes.

    Runs in eval() mode and restores the mode that it found. Raises ValueError where numbers
    are needed and not there, StepFailed where logits are not finite numbers.
    """
    if sampling.temperature > 0:
        _check_uniform(uniform, len(prompts), (num_generations, sampling.max_completion_length))
    parts = 1 if whole_groups or max_rows is None else parts_of_group(num_generations, max_rows)
    if parts > 1:  # the numbers of a prompt's parts lie one after another, as its completions do
        prompts = [prompt for prompt in prompts for _ in range(parts)]
    written: dict[int, list[Completion]] = {}  # by part
    finished: dict[int, list[Completion]] = {}  # by prompt
    layers = sampling_layers(
        policy.net,
        copies=policy.sampling_copies,
        kind=policy.sampling_product,
        placed=policy.graphs.placed,
    )
    calls = policy.graphs.call(
        keep=keep and steps_on(policy.device).graphs and not policy.base.sharded
    )
    with calls, policy.evaluating(), policy.gathered(), layers as head:
        writing = _Writing(
            policy, head, prompts, sampling, num_generations // parts, max_rows, uniform
        )
        while writing.goes_on:
            if should_stop():
                raise StopRequested
            for part, completions in writing.write_token():
                written[part] = completions
                prompt = part // parts
                of_prompt = range(prompt * parts, (prompt + 1) * parts)
                if all(i in written for i in of_prompt):
                    finished[prompt] = [one for i in of_prompt for one in written[i]]
                    on_finished(prompt, finished[prompt])
    return [finished[i] for i in range(len(prompts) // parts)]


def _check_uniform(uniform: Sequence[Tensor] | None, prompts: int, shape: tuple[int, int]) -> None:
    """Refuse numbers that would not be one for each token of each completion."""
    if uniform is None:
        raise ValueError(
            "sampling needs uniform numbers; give them, or temperature 0 for greedy decoding"
        )
    shapes = [tuple(own.shape) for own in uniform]
    if shapes != [shape] * prompts:
        raise ValueError(
            f"uniform numbers need shape {shape} for each of {prompts} prompts: {shapes}"
        )


def parts_of_group(generations: int, max_rows: int) -> int:
    """Find into how many equal parts a prompt's completions fall, none larger than max_rows."""
    return next(
        n
        for n in range(1, generations + 1)
        if generations % n == 0 and generations // n <= max(1, max_rows)
    )


@dataclass
class _Row:
    """Follow one completion that is being decoded.

    completion: its index among all.
    place: its row in the cache.
    since: the value of `written` when it began.
    over: whether it is known to have finished, and is decoded on for the sake of the shapes.
    """

    completion: int
    place: int
    since: int
    over: bool = False


class _Writing:
    """Hold the state of one call: what is decoded, what waits and what has been written.

    What a token needs on the device lies in the buffers of engine/decoding.py.
    """

    def __init__(
        self,
        policy: Policy,
        head: Callable[[Tensor], Tensor],
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingConfig,
        generations: int,
        max_rows: int | None,
        uniform: Sequence[Tensor] | None,
    ):
        self.policy, self.prompts, self.generations = policy, prompts, generations
        self.limit, self.steps = sampling.max_completion_length, steps_on(policy.device)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        # Prompts are taken from the end, so the longest come first.
        self.waiting = sorted(range(len(prompts)), key=lambda i: lengths[i])
        num_places = (
            len(prompts) if max_rows is None else min(len(prompts), max(1, max_rows // generations))
        )
        self.places: list[int | None] = [None] * num_places  # the prompt at each place of the cache
        self.unfinished = {i: generations for i in range(len(prompts))}
        room = Room(
            len(prompts) * generations,
            num_places,
            self.steps.rounded(max(lengths)),
            generations,
            self.steps.rounded(self.limit),
        )
        ids = policy.base.stop_ids, tuple(policy.base.suppressed_ids)  # which the buffers hold
        self.buffers = policy.graphs.held((room, ids), lambda: DecodingBuffers(policy, room))
        self.buffers.begin(uniform)
        self.step = DecodingStep(policy, head, sampling, self.buffers)
        self.rows: list[_Row] = []
        self.written = 0  # tokens decoded in this call so far
        self.masks_left = 0  # tokens whose masks are made already
        self._take_prompts()

    @property
    def goes_on(self) -> bool:
        """Return whether any completion is still being decoded."""
        return any(not row.over for row in self.rows)

    def write_token(self) -> list[tuple[int, list[Completion]]]:
        """Decode one token of every row.

        Returns the prompts that are now found to have finished, each with its completions.
        """
        count = len(self.rows)
        self._run("draw", (count,), partial(self.step.draw, count))
        longest = self.written + 1 - min(row.since for row in self.rows if not row.over)
        finished: list[tuple[int, list[Completion]]] = []
        is_time = (self.written + 1) % self.steps.look_every == 0 or longest == self.limit
        if is_time:
            finished = self._look_for_finished()
        if self.goes_on:
            self._read()
        self.written += 1
        if is_time:
            self._take_prompts()
        return finished

    def _run(self, name: str, shape: tuple[int, ...], work: Callable[[], None]) -> None:
        if self.steps.graphs:
            self.policy.graphs.run(name, shape, work)
        else:
            work()

    def _read(self) -> None:
        """Read the newest token of every row."""
        count, capacity = len(self.rows), self.buffers.room.completion_length
        longest = self.written + 1 - min(row.since for row in self.rows if not row.over)
        if not self.masks_left:
            self.masks_left = MASKS_AHEAD
            length = min(self.steps.rounded(longest + MASKS_AHEAD - 1), capacity)
            self.buffers.make_masks(self.policy, count, self.size, length)
        self.masks_left -= 1
        length = self.steps.rounded(longest)
        self._run(
            "read",
            (*self.buffers.cache.grid, count, self.size, length),
            partial(self.step.read, count, self.size, length),
        )

    def _look_for_finished(self) -> list[tuple[int, list[Completion]]]:
        """Find the rows that have stopped or reached the greatest length.

        They are dropped at once where the steps of the device allow any number of rows. Returns the
        prompts that have finished with their completions.
        """
        stopped, broken = self.buffers.found[:, : len(self.rows)].tolist()
        newly: list[_Row] = []
        for row, stop, failed in zip(self.rows, stopped, broken, strict=True):
            if row.over:
                continue
            if failed and (error := self._not_finite(row)):
                raise error
            if stop or self.written + 1 - row.since == self.limit:
                newly.append(row)
        finished = []
        for row in newly:
            row.over = True
            prompt = row.completion // self.generations
            self.unfinished[prompt] -= 1
            if not self.unfinished[prompt]:
                self.places = [None if own == prompt else own for own in self.places]
                finished.append((prompt, self._completions(prompt)))
        if newly and not self.steps.sizes:
            going_on = [i for i, row in enumerate(self.rows) if not row.over]
            tokens = self.buffers.tokens
            tokens[: len(going_on)] = tokens[torch.tensor(going_on, device=tokens.device).long()]
            self._arrange([self.rows[i] for i in going_on])
        return finished

    def _not_finite(self, row: _Row) -> StepFailed | None:
        """Name the first token of a completion whose logits are not finite.

        None where it had stopped before, and was decoded on for the sake of the shapes.
        """
        ids, logprobs, _ = (recorded[row.completion].cpu() for recorded in self.buffers.recorded)
        own = completion_mask(ids[None], self.policy.base.stop_ids)[0]
        broken = (logprobs.isnan() & own).tolist()
        if True not in broken:
            return None
        prompt = self.prompts[row.completion // self.generations]
        dtype = str(self.buffers.hidden.dtype).removeprefix("torch.")
        return StepFailed(
            f"example {prompt.example!r}: the model's logits are not finite numbers at token"
            f" {broken.index(True) + 1} of its answer; the weights of the model or of its adapter"
            f" are damaged, or too large for {dtype}"
        )

    def _completions(self, prompt: int) -> list[Completion]:
        rows = slice(prompt * self.generations, (prompt + 1) * self.generations)
        written = (tensor[rows, : self.limit] for tensor in self.buffers.recorded)
        ids, logprobs, masses = (tensor.cpu() for tensor in written)  # [G,T]
        mask = completion_mask(ids, self.policy.base.stop_ids)
        truncated = is_truncated(ids, self.policy.base.stop_ids)
        return [
            Completion(
                ids[i][mask[i]], logprobs[i][mask[i]], masses[i][mask[i]], bool(truncated[i])
            )
            for i in range(len(ids))
        ]

    def _take_prompts(self) -> None:
        """Prefill waiting prompts into free places, once enough are free. Else shrink."""
        free = [place for place, prompt in enumerate(self.places) if prompt is None]
        if len(free) < FREE_AT * len(self.places):
            return self._shrink()
        chosen = [(place, self.waiting.pop()) for place in free[: len(self.waiting)]]
        if not chosen:
            return self._shrink()
        taken = {place for place, _ in chosen}
        kept = [i for i, row in enumerate(self.rows) if row.place // self.generations not in taken]
        rows = [self.rows[i] for i in kept]
        states = [self.buffers.hidden[kept]] if kept else []
        for part in self._within(READ_TOKENS, chosen):
            states.append(self._read_prompts(part).repeat_interleave(self.generations, 0))
            for place, i in part:
                self.places[place] = i
                rows += [
                    _Row(i * self.generations + g, place * self.generations + g, self.written)
                    for g in range(self.generations)
                ]
        order = sorted(range(len(rows)), key=lambda i: rows[i].place)
        self.buffers.keep_states(torch.cat(states)[torch.tensor(order, device=self.policy.device)])
        self._arrange([rows[i] for i in order])

    def _read_prompts(self, part: list[tuple[int, int]]) -> Tensor:
        """Prefill (place, prompt) pairs -> the states [b,H] that predict their first tokens."""
        device, buffers = self.policy.device, self.buffers
        places = torch.tensor([place for place, _ in part], device=device)
        batch = collate_prompts(
            [self.prompts[i] for _, i in part], self.policy.encoder.pad_token_id
        )
        # Counted on the CPU: a GPU would have to be waited for.
        tokens = batch.attention_mask.flatten().nonzero()[:, 0].to(device)
        batch = batch.to(device)
        keep = partial(buffers.cache.keep_prompts, slots=places)
        hidden, positions = read_prompts(self.policy.net, self.policy.family, batch, tokens, keep)
        buffers.prompt_mask[places] = torch.nn.functional.pad(
            batch.attention_mask,
            (buffers.prompt_mask.shape[1] - batch.attention_mask.shape[1], 0),
        )
        buffers.prompt_positions[places] = positions
        return hidden

    def _within(
        self, max_tokens: int, chosen: list[tuple[int, int]]
    ) -> list[list[tuple[int, int]]]:
        """Split (place, prompt) pairs into lists of at most `max_tokens`, or of one prompt."""
        parts: list[list[tuple[int, int]]] = []
        tokens = 0
        for place, i in chosen:
            tokens += len(self.prompts[i].input_ids)
            if not parts or tokens > max_tokens:
                parts.append([])
                tokens = len(self.prompts[i].input_ids)
            parts[-1].append((place, i))
        return parts

    def _shrink(self) -> None:
        """Drop the cache's unused places, once nothing waits and a smaller grid holds the rest."""
        by_prompt: dict[int, list[_Row]] = {}
        for row in self.rows:
            if not row.over:
                by_prompt.setdefault(row.place // self.buffers.cache.generations, []).append(row)
        if self.waiting or not by_prompt:
            return
        grid = self._smaller_grid([len(own) for own in by_prompt.values()])
        if grid is None:
            return
        slots, width = grid
        # A prompt with more completions than a slot is wide takes several.
        chosen = [
            (place, own[i : i + width])
            for place, own in sorted(by_prompt.items())
            for i in range(0, len(own), width)
        ]
        chosen += [(chosen[0][0], [])] * (slots - len(chosen))
        spare = iter([row for row in self.rows if row.over])
        before = {id(row): i for i, row in enumerate(self.rows)}
        rows: list[_Row] = []
        cells: list[int] = []
        for slot, (_, own) in enumerate(chosen):
            for g in range(width):
                cell = own[g] if g < len(own) else next(spare, None)
                # where nothing is written any place will do
                cells.append(cell.place if cell else 0)
                if cell:
                    cell.place = slot * width + g
                    rows.append(cell)
        device, cache = self.policy.device, self.buffers.cache
        of_slots = torch.tensor([place for place, _ in chosen], device=device)
        cache.select(of_slots, torch.tensor(cells, device=device))
        for kept in (self.buffers.prompt_mask, self.buffers.prompt_positions):
            kept[:slots] = kept[of_slots]
        self.places = [self.places[place] if own else None for place, own in chosen]
        moved = torch.tensor([before[id(row)] for row in rows], device=device)
        self.buffers.keep_states(self.buffers.hidden[moved])
        self._arrange(rows)

    def _smaller_grid(self, counts: list[int]) -> tuple[int, int] | None:
        """Find the grid to step down to: places for prompts, and for completions of each.

        counts: completions of each prompt that go on. Returns None to stay.
        """
        room, now = self.buffers.room, prod(self.buffers.cache.grid)
        if not self.steps.sizes:
            most = (1 - FREE_AT) * now
            return (len(counts), max(counts)) if len(counts) * max(counts) <= most else None
        for share in sorted(self.steps.sizes):
            rows = int(share * room.prompts * room.generations)
            width = max(1, -(-rows // room.prompts))
            slots = rows // width
            if sum(-(-count // width) for count in counts) <= slots and slots * width < now:
                return slots, width
        return None

    def _arrange(self, rows: list[_Row]) -> None:
        """Decode these rows from now on, and put what that needs on the device."""
        self.rows, self.masks_left = rows, 0
        last = self.buffers.room.completion_length - 1
        self.buffers.arrange(
            [(row.completion, row.place, min(self.written - row.since, last)) for row in rows]
        )
        lengths = [len(self.prompts[i].input_ids) for i in self.places if i is not None]
        # how much of the prompts' places is looked at
        self.size = self.buffers.room.prompt_length if self.steps.sizes else max(lengths, default=0)
