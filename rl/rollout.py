"""Hold what each optimizer step learns from: the stream of prompts and the rollout at hand.

The micro-batches follow from the rollout's lengths alone. The old, reference and policy passes run
the same rows laid out in the same way, so before the first update the ratio is exactly 1 and the
KL exactly 0.

Of several ranks each encodes, samples, rewards and scores whole groups of every optimizer step.
Then all have all samples, in the order of the prompts, so what follows is the same on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from data.examples import Example
from engine.collate import Rows
from engine.completion import Completion, SamplingConfig
from engine.encode import EncodedPrompt
from engine.generate import generate
from engine.order import Order
from engine.out_of_memory import SAMPLING, Limits
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from engine.ranks import ALONE, Ranks
from engine.runtime import StepFailed, StopRequested
from engine.time_limit import TimeLimit
from rl.plan import BatchPlan
from rl.reward_checks import observe
from rl.rewards import RewardFunction
from rl.samples import (
    MicroBatch,
    Sample,
    build_samples,
    collate_samples,
    pack_samples,
    unpack_samples,
)
from rl.settings import GRPOConfig

if TYPE_CHECKING:
    from rl.server_sampler import ServerSampler


class StepTotals(TypedDict):
    """Hold what `token_weights` asks of a whole optimizer step, by its argument names."""

    num_completions: int
    num_tokens: int
    max_completion_length: int


class Rollouts:
    """Hold the rollout at hand, and make the next one, its passes and its micro-batches.

    It computes no gradient and logs nothing. What changes its samples is called from the loop, in
    this order: `take`, `reward`, `score`, `set_advantages`, `keep_old`.

    plan: how many prompts, completions and steps belong together.
    limits: how much is run at once.
    examples, prompts: those of the rollout at hand, the prompts encoded. Prompts of other ranks
    have their tokens alone, without the features of their images.
    first: the position in the run of its first prompt.
    samples: its completions, those of one prompt together. [] before the first rollout.
    server: samples them in the engine's place, None without --use_vllm.
    """

    def __init__(
        self,
        data: Sequence[Example],
        reward_functions: dict[str, RewardFunction],
        config: GRPOConfig,
        ranks: Ranks = ALONE,
    ):
        """Begin the stream. data: the training examples, each a prompt."""
        self.data, self.reward_functions, self.ranks = data, reward_functions, ranks
        self.order = Order(data, config.hospital_weights, config.seed)
        self.plan = BatchPlan.of(config, ranks.size)
        self.settle(config)
        self._with_reference = False  # when the rollout was scored
        self._scored_again = False  # in smaller micro-batches, which other ranks do not know yet
        self.examples: list[Example] = []
        self.prompts: list[EncodedPrompt] = []
        self.first = 0
        self.samples: list[Sample] = []
        self.server: ServerSampler | None = None

    def settle(self, config: GRPOConfig) -> None:
        """Take the settings that fit this machine, which say how much is run at once.

        config: as in the beginning, but for how much is run at once and how products are made.
        """
        self.config, self.limits = config, Limits(config)

    def lines(self) -> list[str]:
        """Say in lines of the start banner how prompts and steps relate, and who samples."""
        lines = self.plan.lines(len(self.data), self.config.reward)
        if self.config.use_vllm:
            lines.append(
                f"sampler     vLLM at {self.config.vllm_server_base_url}: resume is no longer exact"
                " to the bit. Prompts, their order, what rewards remember, optimizer and a rollout"
                " in progress stay the same; new completions differ"
            )
        return lines

    # ---- the stream of prompts -------------------------------------------------------------------
    def update_of(self, step: int) -> int:
        """Say which update of its rollout an optimizer step is, from 0. 0 begins a new rollout."""
        return step % self.plan.updates

    def epoch_after(self, steps: int) -> float:
        """Say how often the prompts have been gone through after so many optimizer steps."""
        rollout_index, update = divmod(steps - 1, self.plan.updates)
        done = rollout_index + (update + 1) / self.plan.updates
        return done * self.plan.prompts / len(self.data)

    def take(
        self, step: int, policy: Policy, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Take the prompts of the rollout that `step` belongs to: a stream of shuffled epochs.

        Does nothing where they are at hand already. Raises DataError for an unreadable image,
        StopRequested once should_stop says so.
        """
        if self.prompts and self.update_of(step) > 0:
            return
        rollout, groups = step // self.plan.updates, self._own_groups()
        examples = self._examples_of(rollout)
        own: list[EncodedPrompt] = []
        policy.expect(examples[group] for group in groups)
        with self.ranks.together():
            for group in groups:
                if should_stop():
                    raise StopRequested
                own.append(policy.encode(examples[group]))
        self.examples, self.prompts = examples, self._all_prompts(own)
        self.first = rollout * self.plan.prompts
        if (rollout + 1) * self.plan.updates < self.plan.total_steps(len(self.data)):
            following = self._examples_of(rollout + 1)
            policy.expect(following[group] for group in groups)

    def _examples_of(self, rollout: int) -> list[Example]:
        """List the examples of a rollout, from 0: its positions in the stream of epochs."""
        count, size = self.plan.prompts, len(self.data)
        positions = range(rollout * count, (rollout + 1) * count)
        places = [divmod(position, size) for position in positions]
        return [self.data[self.order.epoch(epoch)[index]] for epoch, index in places]

    def _own_groups(self) -> list[int]:
        """List this rank's prompts: whole groups of each optimizer step of a pass."""
        rows = self._rows_of(self.ranks.rank, range(self.plan.steps))
        return list(dict.fromkeys(row // self.plan.group for row in rows))

    def _rows_of(self, rank: int, updates: Sequence[int]) -> list[int]:
        """List what a rank learns from in some updates, by their place in the rollout."""
        return [row for update in updates for row in self.plan.own(update, rank)]

    def _all_prompts(self, own: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """Put the prompts of all ranks in order. own: this rank's."""
        if self.ranks.size == 1:
            return list(own)
        prompts = dict(zip(self._own_groups(), own, strict=True))
        tokens = {str(group): prompt.input_ids for group, prompt in prompts.items()}
        for of_rank in self.ranks.gather_tensors(tokens):
            for group, ids in of_rank.items():
                prompts.setdefault(int(group), EncodedPrompt(ids, torch.zeros_like(ids), {}))
        return [prompts[group] for group in range(len(prompts))]

    # ---- the rollout, in the order of the loop ---------------------------------------------------
    def sample(self, policy: Policy, should_stop: Callable[[], bool]) -> list[list[Completion]]:
        """Sample G completions of each prompt at hand, by the numbers of its position in the run.

        Of several ranks each samples those of its own prompts. Where memory runs out, the same
        completions are sampled again, fewer of them together. Raises StopRequested once should_stop
        says so.
        """
        config, groups = self.config, self._own_groups()
        if self.server is not None:
            return self._sample_on(self.server, groups, policy, should_stop)
        shape = config.num_generations, config.max_completion_length
        uniform = [
            uniform_numbers("rollout", config.seed, self.first + group, *shape) for group in groups
        ]

        def decode(max_rows: int | None) -> list[list[Completion]]:
            return generate(
                policy,
                [self.prompts[group] for group in groups],
                SamplingConfig(config.temperature, config.top_p, config.max_completion_length),
                num_generations=config.num_generations,
                max_rows=max_rows,
                whole_groups=False,
                uniform=uniform,
                should_stop=should_stop,
                keep=True,
            )

        with self.ranks.together():
            return self.limits.decoded(
                "rollout",
                SAMPLING,
                config.sampling_batch_size,
                lambda: len(groups) * self.plan.group,
                decode,
            )

    def _sample_on(
        self,
        server: ServerSampler,
        groups: Sequence[int],
        policy: Policy,
        should_stop: Callable[[], bool],
    ) -> list[list[Completion]]:
        """Sample on a server, which is given the policy's adapter first. groups: own prompts."""
        rollout = self.first // self.plan.prompts
        return server.sample(
            policy,
            [self.examples[group] for group in groups],
            [self.prompts[group] for group in groups],
            [self.first + group for group in groups],
            rollout * self.plan.updates,
            should_stop,
        )

    def reward(
        self,
        completions: Sequence[Sequence[Completion]],
        policy: Policy,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Parse and reward the completions. All rewards are computed, one is trained on.

        What the rewards remember of earlier completions changes after all are computed.

        Raises RewardFailed for a reward that is no finite number, raises or hangs, and
        StopRequested for one that hangs once should_stop says so.
        """
        limit, groups = TimeLimit(self.config.reward_timeout, should_stop), self._own_groups()
        with self.ranks.together():
            own = build_samples(
                [self.examples[group] for group in groups],
                completions,
                policy.encoder.decode,
                self.reward_functions,
                self.config.trained_reward,
                answer_format=self.config.answer_format,
                mask_truncated_completions=self.config.mask_truncated_completions,
                text_length=policy.encoder.text_length,
                length_of=self.config.length_of,
                limit=limit,
            )
        self.samples = self._all_samples(own, groups, policy)
        answers = [sample.answer for sample in self.samples]
        images = [sample.group for sample in self.samples]
        targets = [sample.example.target for sample in self.samples]
        with self.ranks.together():
            observe(self.reward_functions, answers, images, targets, limit)

    def _all_samples(
        self, own: list[Sample], groups: Sequence[int], policy: Policy
    ) -> list[Sample]:
        """Put the samples of all ranks in the order of the prompts.

        own: this rank's, of the prompts `groups`.
        """
        if self.ranks.size == 1:
            return own
        for sample in own:
            sample.group = groups[sample.group]
        tensors, record = pack_samples(own)
        decode, answer_format = policy.encoder.decode, self.config.answer_format
        told = zip(self.ranks.gather_tensors(tensors), self.ranks.gather(record), strict=True)
        samples = [
            sample
            for of_rank in told
            for sample in unpack_samples(*of_rank, self.examples, decode, answer_format)
        ]
        return sorted(samples, key=lambda sample: sample.group)

    def score(
        self,
        policy: Policy,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        with_reference: bool,
    ) -> None:
        """Compute log pi_ref of every sample, and log pi_old beyond the first update.

        Once a rollout, in eval() mode, on the micro-batches of the updates to come. The first
        update finds its own old log-probabilities: nothing has changed when it runs (`keep_old`).
        Without the reference (beta 0) the sampler's log-probabilities stand for log pi_ref, so that
        `kl` is 0. Where memory runs out, all are scored again in smaller micro-batches. Raises
        StopRequested once should_stop says so.
        """

        self._with_reference = with_reference
        with self.ranks.together():
            self._score(policy, should_stop)
        self._tell("ref_logprobs", range(self.plan.steps))
        self._tell("old_logprobs", range(1, self.plan.steps))

    def _score(self, policy: Policy, should_stop: Callable[[], bool]) -> None:
        """Score this rank's samples, all of them by the reference first: to switch takes time."""

        @torch.no_grad()
        def reference(rows: list[int]) -> None:
            found = policy.logprobs(self.micro_batch(rows, policy).batch).cpu()  # [N,T]
            for row, values in zip(rows, found, strict=True):
                self.samples[row].ref_logprobs = values[: len(self.samples[row].ids)]

        @torch.no_grad()
        def old(rows: list[int]) -> None:
            if rows[0] >= self.plan.per_step:
                self._keep_old([rows], [policy.logprobs(self.micro_batch(rows, policy).batch)])

        if not self._with_reference:
            for row in self._rows_of(self.ranks.rank, range(self.plan.steps)):
                self.samples[row].ref_logprobs = self.samples[row].sampling_logprobs
        with policy.evaluating():
            while True:
                if self._with_reference:
                    with policy.reference():
                        self.limits.each("scoring", self.rows(), reference, (), should_stop)
                scored_in = self.limits.max_tokens
                self.limits.each("scoring", self.rows(), old, (), should_stop)
                if scored_in == self.limits.max_tokens:
                    return  # else memory ran out, and all passes share the same micro-batches

    def score_again(self, update: int, policy: Policy) -> None:
        """Score in smaller micro-batches, once memory has run out in an update.

        Only in the first update, in which the policy is still the one that sampled. It is then
        compared with a reference that ran in the same micro-batches, so its KL stays exactly 0.
        Other ranks learn of it in `keep_old`.
        """
        if update == 0:
            self._score(policy, lambda: False)
            self._scored_again = True

    def _tell(self, name: str, updates: Sequence[int]) -> None:
        """Give all ranks what each has computed of its own samples.

        name: a field of Sample with a value a token. updates: whose samples have it.
        """
        if self.ranks.size == 1 or not updates:
            return
        rows = [self._rows_of(rank, updates) for rank in range(self.ranks.size)]
        own = torch.cat([getattr(self.samples[row], name) for row in rows[self.ranks.rank]])
        for of_rank, told in zip(rows, self.ranks.gather_tensors({name: own}), strict=True):
            pieces = told[name].split([len(self.samples[row].ids) for row in of_rank])
            for row, values in zip(of_rank, pieces, strict=True):
                setattr(self.samples[row], name, values)

    def set_advantages(self, advantages: Tensor) -> None:
        """Give every sample its A_i. advantages [R]: in the samples' order.

        The rollout is whole then. Raises StepFailed where one of its numbers is not finite: saved,
        it would end every run that goes on from it.
        """
        for sample, advantage in zip(self.samples, advantages.tolist(), strict=True):
            sample.advantage = advantage
        self.check_finite("old_logprobs")

    def check_finite(self, *more: str) -> None:
        """Refuse a rollout to learn from that holds infinity or NaN, and name the example.

        more: fields of Sample to look at beside those that every rollout has. Raises StepFailed.
        """
        for sample in self.samples:
            for name in ("sampling_logprobs", *more, "ref_logprobs", "advantage"):
                values = torch.as_tensor(getattr(sample, name))
                if not values.isfinite().all():
                    shown = values.item() if name == "advantage" else "not finite"
                    raise StepFailed(
                        f"example {sample.example.id!r}: {name} of a completion is {shown}; what"
                        " computes it, the model's weights or the adapter's are damaged"
                    )

    def keep_old(self, micro_batches: Sequence[Sequence[int]], logprobs: Sequence[Tensor]) -> None:
        """Keep the log-probabilities of the first update, [N,T] a micro-batch, as the old ones.

        All ranks keep those of all. To copy them from the GPU is to wait for it, so the loop calls
        this once a step.
        """
        self._keep_old(micro_batches, logprobs)
        self._tell("old_logprobs", [0])
        if any(self.ranks.gather(self._scored_again)):  # by a rank whose memory ran out
            self._tell("ref_logprobs", range(self.plan.steps))
            self._tell("old_logprobs", range(1, self.plan.steps))
        self._scored_again = False

    def _keep_old(self, micro_batches: Sequence[Sequence[int]], logprobs: Sequence[Tensor]) -> None:
        for rows, of_rows in zip(micro_batches, logprobs, strict=True):
            for row, values in zip(rows, of_rows.detach().cpu(), strict=True):
                self.samples[row].old_logprobs = values[: len(self.samples[row].ids)]

    # ---- what the advantages are made of ---------------------------------------------------------
    @property
    def groups(self) -> Tensor:
        """Return the index of each sample's prompt [R] int64."""
        return torch.tensor([sample.group for sample in self.samples])

    @property
    def hospitals(self) -> Tensor:
        """Return the number of each sample's hospital [R] int64, 0 where there is one alone."""
        numbers = {name: number for number, name in enumerate(self.order.counts)}
        return torch.tensor([numbers.get(one.example.hospital, 0) for one in self.samples])

    @property
    def rewards(self) -> Tensor:
        """Return R_i [R] fp64, so that equal rewards stay equal."""
        return torch.tensor([sample.reward for sample in self.samples], dtype=torch.float64)

    @property
    def kl(self) -> Tensor:
        """Return log pi_old - log pi_ref summed over each completion [R] fp64, for a fork's reward.

        The sampler's log-probabilities stand for log pi_old: the first update's are not known yet.
        With a server they are its own, and a reward that takes this learns from their rounding.
        """
        return torch.stack(
            [
                (sample.sampling_logprobs - sample.ref_logprobs)[sample.mask].double().sum()
                for sample in self.samples
            ]
        )

    # ---- micro-batches ---------------------------------------------------------------------------
    def rows(self, update: int | None = None) -> Rows:
        """Return what this rank learns from in an update, None for all of a pass, to be cut.

        A micro-batch that costs more than max_tokens_per_forward is cut. Where a cut parts a group,
        its prompt is in both halves. The same rows serve every pass over the rollout.
        """
        updates = range(self.plan.steps) if update is None else [update]
        of_rank = self._rows_of(self.ranks.rank, updates)
        rows = [self.samples[row].row(self.prompts) for row in of_rank]
        return Rows(rows, self.plan.micro_batch, of_rank, self.plan.per_rank)

    def micro_batches(self, update: int) -> list[list[int]]:
        """List the rows of each of this rank's micro-batches of an update.

        The same micro-batches serve every pass over the rollout, so that the ratio is exactly 1 at
        first.
        """
        return self.rows(update).micro_batches(self.limits.max_tokens)

    def totals(self, update: int) -> StepTotals:
        """Count completions and tokens of a WHOLE optimizer step, all ranks', for its weights."""
        rows = [row for rank in range(self.ranks.size) for row in self._rows_of(rank, [update])]
        return {
            "num_completions": len(rows),
            "num_tokens": sum(int(self.samples[row].mask.sum()) for row in rows),
            "max_completion_length": self.config.max_completion_length,
        }

    def micro_batch(self, rows: Sequence[int], policy: Policy) -> MicroBatch:
        """Pad the samples of these rows into one micro-batch on the policy's device."""
        samples = [self.samples[row] for row in rows]
        return collate_samples(samples, self.prompts, policy.encoder.pad_token_id, policy.device)

    def unfinished(self, step: int) -> list[Sample]:
        """Return the samples that steps after `step` still learn from, for a checkpoint."""
        return self.samples if self.update_of(step) else []
