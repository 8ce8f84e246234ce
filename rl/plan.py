"""Count how prompts, completions and optimizer steps of a GRPO run relate, in one place.

    micro-batch    per_device_train_batch_size completions
    step           gradient_accumulation_steps micro-batches of every rank: one optimizer step
    rollout        steps_per_generation micro-batches of every rank, whole groups of
                   num_generations completions
    updates        the optimizer steps that learn from one rollout, num_iterations passes over it

It is plain Python, so a command line is checked without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.settings import by_ranks, rounded_up

if TYPE_CHECKING:
    from rl.settings import GRPOConfig


@dataclass(frozen=True)
class BatchPlan:
    """Hold the batch arithmetic of one run, made once by `BatchPlan.of(config, ranks)`."""

    micro_batch: int  # completions in a micro-batch
    accumulation: int  # micro-batches of a rank in an optimizer step
    micro_batches: int  # micro-batches of a rank in a rollout
    group: int  # completions of one prompt, G of Eq. 2
    iterations: int  # passes over a rollout
    epochs: float  # passes over the prompts, where max_steps is None
    max_steps: int | None
    ranks: int = 1  # processes that share every step

    @classmethod
    def of(cls, config: GRPOConfig, ranks: int = 1) -> BatchPlan:
        """Take the counts from the settings, with a rollout of two steps where none is given.

        ranks: how many there are.
        """
        return cls(
            micro_batch=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            micro_batches=config.steps_per_generation or 2 * config.gradient_accumulation_steps,
            group=config.num_generations,
            iterations=config.num_iterations,
            epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            ranks=ranks,
        )

    @property
    def completions(self) -> int:
        """Count the completions of a rollout, of all ranks."""
        return self.micro_batch * self.micro_batches * self.ranks

    @property
    def per_step(self) -> int:
        """Count the completions of an optimizer step, of all ranks."""
        return self.per_rank * self.ranks

    @property
    def per_rank(self) -> int:
        """Count the completions of an optimizer step that one rank learns from."""
        return self.micro_batch * self.accumulation

    @property
    def prompts(self) -> int:
        """Count the prompts of a rollout, of all ranks."""
        return self.completions // self.group

    @property
    def steps(self) -> int:
        """Count the optimizer steps of one pass over a rollout."""
        return self.micro_batches // self.accumulation

    @property
    def own_prompts(self) -> int:
        """Count the prompts of a rollout that one rank samples for."""
        return self.prompts // self.ranks

    @property
    def updates(self) -> int:
        """Count the optimizer steps that learn from one rollout."""
        return self.steps * self.iterations

    def own(self, update: int, rank: int) -> range:
        """Return the completions of a rollout that a rank learns from in one of its updates.

        Those of a step lie together, each rank's in the order of the ranks. With several ranks a
        rank has whole groups. Every pass over the rollout takes the same.
        """
        first = update % self.steps * self.per_step + rank * self.per_rank
        return range(first, first + self.per_rank)

    def total_steps(self, num_examples: int) -> int:
        """Count the optimizer steps of the run, by epochs the next whole number of rollouts.

        So one epoch sees every prompt at least once.
        """
        rollouts = rounded_up(self.epochs * num_examples / self.prompts)
        return self.max_steps or rollouts * self.updates

    def problems(self) -> list[str]:
        """Name batches that do not divide, one line each, with the nearest sizes that do."""
        found = []
        if self.micro_batches % self.accumulation:
            lower = self.micro_batches // self.accumulation * self.accumulation
            nearest = [n for n in (lower, lower + self.accumulation) if n > 0]
            found.append(
                f"--steps_per_generation {self.micro_batches} does not divide into optimizer steps"
                f" of --gradient_accumulation_steps {self.accumulation}; the nearest that do:"
                f" {', '.join(map(str, nearest))}"
            )
        if self.ranks > 1 and self.per_rank % self.group:
            found.append(
                f"--per_device_train_batch_size {self.micro_batch} x --gradient_accumulation_steps"
                f" {self.accumulation} = {self.per_rank} completions, which each of the"
                f" {self.ranks} ranks takes of a step, do not divide into groups of"
                f" --num_generations {self.group}; {self._nearest(self.accumulation)}"
            )
        elif self.completions % self.group:
            found.append(
                f"a rollout of --per_device_train_batch_size {self.micro_batch} x"
                f" {self.micro_batches} micro-batches = {self.completions} completions does not"
                f" divide into groups of --num_generations {self.group};"
                f" {self._nearest(self.micro_batches)}"
            )
        return found

    def _nearest(self, micro_batches: int) -> str:
        """Name the nearest micro-batches so many of which are whole groups."""
        sizes = range(1, self.micro_batch + self.group + 1)
        fitting = [size for size in sizes if size * micro_batches % self.group == 0]
        lower = max((n for n in fitting if n < self.micro_batch), default=fitting[0])
        higher = min(n for n in fitting if n > self.micro_batch)
        nearest = ", ".join(map(str, sorted({lower, higher})))
        return f"the nearest --per_device_train_batch_size that do: {nearest}"

    def lines(self, num_examples: int, trained_on: str) -> list[str]:
        """Say in three lines of the start banner how prompts, completions and steps relate.

        num_examples: prompts of the training data.
        trained_on: name of the reward, for the last line.
        """
        steps = self.total_steps(num_examples)
        rollouts = -(-steps // self.updates)
        prompts, completions = rollouts * self.prompts, rollouts * self.completions
        epochs = f"{prompts / num_examples:.2f} epochs"
        if not self.max_steps and prompts > rounded_up(self.epochs * num_examples):
            epochs += f": {self.epochs:g} rounded up to whole rollouts"
        return [
            f"rollout     {self.prompts} prompts x {self.group} completions = {self.completions}"
            f" completions, {self.updates} optimizer steps each",
            f"batch       {self.micro_batch} completions x {self.accumulation} accumulated"
            f"{by_ranks(self.ranks)} = {self.per_step} an optimizer step",
            f"run         {steps} optimizer steps = {rollouts} rollouts = {prompts} prompts"
            f" ({epochs}) = {completions} completions; trained on the"
            f" {trained_on} reward",
        ]


def total_steps(config: GRPOConfig, num_examples: int, ranks: int = 1) -> int:
    """Count the optimizer steps of a whole run of so many ranks, from its settings."""
    return BatchPlan.of(config, ranks).total_steps(num_examples)
