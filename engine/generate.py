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

import torch
from torch import Tensor

from engine.cache import DecodingMask, SamplingCache
from engine.collate import collate_prompts
from engine.encode import EncodedPrompt
from engine.forward import decoding_masks, read_prompts, read_tokens
from engine.logprobs import scaled_logits
from engine.nucleus import draw
from engine.policy import Policy
from engine.runtime import StepFailed, StopRequested
from engine.sampling_layers import sampling_layers
from engine.settings import MAX_COMPLETION_LENGTH, TEMPERATURE, TOP_P

# Places are filled again, or dropped by copying the cache, once this share of them is free.
FREE_AT = 0.25
# Prompts are prefilled this many tokens at a time: more is no faster and needs more memory.
READ_TOKENS = 2048
MASKS_AHEAD = 8  # the masks of this many coming tokens are made together
# Finished rows are looked for every so many tokens, because each look waits for the GPU.
CHECK_EVERY = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class SamplingConfig:
    """Say how completions are drawn. Temperature 0 is greedy decoding."""

    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_completion_length: int = MAX_COMPLETION_LENGTH


@dataclass(frozen=True)
class Completion:
    """Hold one sampled completion.

    ids [C] int64: up to and including the stop token.
    logprobs [C] fp32: of these tokens, at the sampling temperature (1 when greedy), over the whole
        vocabulary without the suppressed ids.
    top_p_mass [C] fp32: probability that the nucleus held at each token.
    truncated: True where no stop token came.
    """

    ids: Tensor
    logprobs: Tensor
    top_p_mass: Tensor
    truncated: bool


def completion_mask(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """Mark the tokens up to and including the first stop token, or all where there is none.

    The stop token's position decides, never a comparison with the padding id, which may be a stop
    id.

    ids [N,T] int64.
    Returns [N,T] bool.
    """
    is_stop = torch.isin(ids, torch.tensor(sorted(stop_ids), device=ids.device))  # [N,T]
    stopped_before = is_stop.long().cumsum(1) - is_stop.long()  # [N,T] strictly before each token
    return stopped_before == 0


def is_truncated(ids: Tensor, stop_ids: Sequence[int] | frozenset[int]) -> Tensor:
    """Tell which rows hold no stop token. One at the last position is not a truncation.

    ids [N,T] int64.
    Returns [N] bool.
    """
    return ~torch.isin(ids, torch.tensor(sorted(stop_ids), device=ids.device)).any(1)


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
        policy.net, copies=policy.sampling_copies, kind=policy.sampling_product
    )
    with policy.evaluating(), policy.gathered(), layers as head:
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
    """

    completion: int
    place: int
    since: int


class _Writing:
    """Hold the state of one call: what is decoded, what waits and what has been written."""

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
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        self.head, self.softcap, self.generations = head, policy.softcap, generations
        self.device, base = policy.device, policy.base
        self.check_every = CHECK_EVERY.get(self.device.type, 1)
        self.suppressed = torch.tensor(base.suppressed_ids, dtype=torch.long, device=self.device)
        self.stops = torch.tensor(sorted(base.stop_ids), device=self.device)
        shape = len(prompts) * generations, sampling.max_completion_length
        self.ids = torch.full(shape, policy.encoder.pad_token_id, device=self.device)  # [N,T]
        self.logprobs = torch.zeros(shape, device=self.device)
        self.masses = torch.ones(shape, device=self.device)
        if sampling.temperature > 0:
            assert uniform is not None, "generate() asks for them"
            self.uniform = torch.cat(list(uniform)).to(self.device)  # [N,T]

        lengths = [len(prompt.input_ids) for prompt in prompts]
        # Prompts are taken from the end, so the longest come first.
        self.waiting = sorted(range(len(prompts)), key=lambda i: lengths[i])
        num_places = (
            len(prompts) if max_rows is None else min(len(prompts), max(1, max_rows // generations))
        )
        self.places: list[int | None] = [None] * num_places  # the prompt at each place of the cache
        self.unfinished = {i: generations for i in range(len(prompts))}
        self.cache = SamplingCache(num_places, max(lengths), generations, shape[1])
        self.prompt_mask = torch.zeros(
            num_places, max(lengths), dtype=torch.bool, device=self.device
        )  # [B,S]
        # Position id of the first token after each prompt, [B].
        self.positions = torch.zeros(num_places, dtype=torch.long, device=self.device)
        self.rows: list[_Row] = []
        self.written = 0  # tokens decoded in this call so far
        # The states that predict the next tokens, [n,H].
        self.hidden = policy.head.new_zeros(0, policy.head.shape[1])
        self.masks: list[dict[str, DecodingMask]] = []  # of the next tokens, as far as made
        self._take_prompts()

    @property
    def goes_on(self) -> bool:
        """Return whether any completion is still being decoded."""
        return bool(self.rows)

    def write_token(self) -> list[tuple[int, list[Completion]]]:
        """Decode one token of every row.

        Returns the prompts that are now found to have finished, each with its completions.
        """
        tokens = self._choose()
        self.written += 1
        finished: list[tuple[int, list[Completion]]] = []
        is_time = (
            self.written % self.check_every == 0
            or self._longest() == self.sampling.max_completion_length
        )
        if is_time:
            tokens, finished = self._take_finished_out(tokens)
        self.hidden = self.hidden[:0]
        if self.rows:
            self.hidden = read_tokens(
                self.policy.net,
                self.policy.family,
                tokens,
                self.row_positions + self.written - 1,
                self._next_masks(),
            )
        if is_time:
            self._take_prompts()
        return finished

    def _longest(self) -> int:
        return max(self.written - row.since for row in self.rows)

    def _next_masks(self) -> dict[str, DecodingMask]:
        """Return the masks of the next token, from those made MASKS_AHEAD tokens at a time."""
        if not self.masks:
            ahead = torch.arange(MASKS_AHEAD, device=self.device)
            offsets = self.written - 1 - self.since + ahead[:, None]  # [Q,n]
            self.masks = decoding_masks(
                self.policy.net,
                self.policy.family,
                self.cache,
                self.row_places,
                offsets,
                self.row_mask,
                self._longest(),
            )
        return self.masks.pop(0)

    def _choose(self) -> Tensor:
        """Draw a token [n] for every row and record it with its log-probability."""
        at = self.completions, self.written - self.since
        temperature = self.sampling.temperature or 1.0
        tempered = scaled_logits(
            self.head(self.hidden), temperature, self.suppressed, self.softcap
        ).log_softmax(1)  # [n,V]
        if self.sampling.temperature > 0:
            tokens, mass = draw(tempered, self.sampling.top_p, self.uniform[at])
            self.masses[at] = mass.float()
        else:
            tokens = tempered.argmax(1)
        self.ids[at] = tokens
        chosen = tempered.gather(1, tokens[:, None])[:, 0].float()
        self.logprobs[at] = chosen
        self.stopped |= torch.isin(tokens, self.stops)
        # one NaN or infinity among a row's logits makes all its log-probabilities NaN
        self.broken |= chosen.isnan()
        return tokens

    def _take_finished_out(
        self, tokens: Tensor
    ) -> tuple[Tensor, list[tuple[int, list[Completion]]]]:
        """Drop the rows that have stopped or reached the greatest length.

        tokens [n] int64: the newest token of every row.
        Returns (the tokens of the rows that go on, the prompts that have finished with their
        completions).
        """
        stopped, broken = torch.stack([self.stopped, self.broken]).tolist()
        if any(broken):
            raise self._not_finite(self.rows[broken.index(True)])
        over = [
            stop or self.written - row.since == self.sampling.max_completion_length
            for row, stop in zip(self.rows, stopped, strict=True)
        ]
        if not any(over):
            return tokens, []
        finished = []
        for row in (row for row, done in zip(self.rows, over, strict=True) if done):
            prompt = row.completion // self.generations
            self.unfinished[prompt] -= 1
            if not self.unfinished[prompt]:
                self.places[self.places.index(prompt)] = None
                finished.append((prompt, self._completions(prompt)))
        going_on = torch.tensor(
            [i for i, done in enumerate(over) if not done], dtype=torch.long, device=self.device
        )
        self.rows = [row for row, done in zip(self.rows, over, strict=True) if not done]
        self._arrange()
        return tokens[going_on], finished

    def _not_finite(self, row: _Row) -> StepFailed:
        """Name the first token of a completion whose logits are not finite."""
        place = self.logprobs[row.completion].isnan().tolist().index(True)
        prompt = self.prompts[row.completion // self.generations]
        return StepFailed(
            f"example {prompt.example!r}: the model's logits are not finite numbers at token"
            f" {place + 1} of its answer; the weights of the model or of its adapter are damaged,"
            f" or too large for {str(self.hidden.dtype).removeprefix('torch.')}"
        )

    def _completions(self, prompt: int) -> list[Completion]:
        rows = slice(prompt * self.generations, (prompt + 1) * self.generations)
        written = (self.ids, self.logprobs, self.masses)
        ids, logprobs, masses = (tensor[rows].cpu() for tensor in written)  # [G,T]
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
        for part in self._within(READ_TOKENS, chosen):
            places = torch.tensor([place for place, _ in part], device=self.device)
            batch = collate_prompts(
                [self.prompts[i] for _, i in part], self.policy.encoder.pad_token_id
            )
            # Counted on the CPU: a GPU would have to be waited for.
            tokens = batch.attention_mask.flatten().nonzero()[:, 0].to(self.device)
            batch = batch.to(self.device)
            hidden, positions = read_prompts(
                self.policy.net,
                self.policy.family,
                batch,
                tokens,
                partial(self.cache.keep_prompts, slots=places),
            )
            self.prompt_mask[places] = torch.nn.functional.pad(
                batch.attention_mask, (self.prompt_mask.shape[1] - batch.attention_mask.shape[1], 0)
            )
            self.positions[places] = positions
            for place, i in part:
                self.places[place] = i
                self.rows += [
                    _Row(i * self.generations + g, place * self.generations + g, self.written)
                    for g in range(self.generations)
                ]
            self.hidden = torch.cat([self.hidden, hidden.repeat_interleave(self.generations, 0)])
        order = sorted(range(len(self.rows)), key=lambda i: self.rows[i].place)
        self.rows = [self.rows[i] for i in order]
        self.hidden = self.hidden[torch.tensor(order, device=self.device)]
        self._arrange()

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
        """Drop the cache's unused places, once nothing waits and a good part of them is free."""
        by_prompt: dict[int, list[_Row]] = {}
        for row in self.rows:
            by_prompt.setdefault(row.place // self.cache.generations, []).append(row)
        width = max(map(len, by_prompt.values()), default=0)
        if (
            self.waiting
            or not 0
            < len(by_prompt) * width
            <= (1 - FREE_AT) * self.cache.num_prompts * self.cache.generations
        ):
            return
        rows = []
        for new, (_, own) in enumerate(sorted(by_prompt.items())):
            # Where nothing is written any place will do.
            rows += [row.place for row in own] + [0] * (width - len(own))
            for g, row in enumerate(own):
                row.place = new * width + g
        prompts = torch.tensor(sorted(by_prompt), device=self.device)
        self.cache.select(prompts, torch.tensor(rows, device=self.device))
        self.prompt_mask, self.positions = self.prompt_mask[prompts], self.positions[prompts]
        self.places = [self.places[place] for place in sorted(by_prompt)]
        self._arrange()

    def _arrange(self) -> None:
        """Put what the next tokens need of the rows on the device."""

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=self.device)

        self.completions = tensor([row.completion for row in self.rows])  # [n]
        self.row_places = tensor([row.place for row in self.rows])  # [n]
        self.since = tensor([row.since for row in self.rows])  # [n]
        self.stopped = torch.zeros(len(self.rows), dtype=torch.bool, device=self.device)
        self.broken = torch.zeros_like(self.stopped)
        prompts = self.row_places // self.cache.generations
        longest = max(
            (len(self.prompts[i].input_ids) for i in self.places if i is not None), default=0
        )
        self.row_mask = self.prompt_mask[prompts, self.prompt_mask.shape[1] - longest :]  # [n,S]
        # Position id of the first token, less `since`: plus `written` - 1 it is the newest's.
        self.row_positions = self.positions[prompts] - self.since  # [n]
        self.masks = []
