"""One rollout: G completions of each prompt with rewards, advantages, old and reference
log-probabilities, and its micro-batches.

A rollout is a list of `Sample`s on the CPU, one a completion, padded only when a micro-batch is
made of them. The micro-batches follow from its lengths alone: the old, reference and policy passes
run on the same rows laid out in the same way, so before the first update the ratio is exactly 1 and
the KL exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.answers import Answer, parse_answer
from data.examples import Example
from engine.collate import Batch, collate_rows, plan_batches
from engine.encode import EncodedPrompt, EncodedRow
from engine.forward import completion_logprobs
from engine.generate import Completion
from engine.model import REFERENCE, LoadedModel, use_adapter
from rl.objective import ObjectiveConfig, group_advantages
from rl.rewards import Reward, RewardFunction


@dataclass(frozen=True)
class Sample:
    """One completion with all that the objective needs of it.

    prompt: index of its prompt in the rollout, which is its group. ids [C] int64; mask [C] bool,
    all false where a truncated completion is left out of the loss; sampling_logprobs, top_p_mass,
    old_logprobs, ref_logprobs [C] fp32. rewards: every reward by name. reward: what is trained on,
    scaled. advantage: A_i.
    """

    prompt: int
    example: Example
    text: str
    answer: Answer
    ids: Tensor
    mask: Tensor
    truncated: bool
    sampling_logprobs: Tensor
    top_p_mass: Tensor
    rewards: dict[str, Reward]
    reward: float
    advantage: float = 0.0
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


def build_samples(
    examples: Sequence[Example],
    completions: Sequence[Sequence[Completion]],
    decode: Callable[[Tensor], str],
    reward_functions: dict[str, RewardFunction],
    trained_reward: str,
    *,
    answer_format: str,
    mask_truncated_completions: bool,
) -> list[Sample]:
    """Parse and reward every completion; samples of one prompt lie together, in the prompts' order.

    All rewards are computed from the windows as they stood before this rollout; `observe` is the
    caller's to call, once, afterwards.
    """
    samples = []
    for index, (example, group) in enumerate(zip(examples, completions, strict=True)):
        for completion in group:
            text = decode(completion.ids)
            answer = parse_answer(text, answer_format)
            rewards = {
                name: function(answer, example.target, len(completion.ids))
                for name, function in reward_functions.items()
            }
            mask = torch.full(
                (len(completion.ids),), not (completion.truncated and mask_truncated_completions)
            )
            samples.append(
                Sample(
                    prompt=index,
                    example=example,
                    text=text,
                    answer=answer,
                    ids=completion.ids,
                    mask=mask,
                    truncated=completion.truncated,
                    sampling_logprobs=completion.logprobs,
                    top_p_mass=completion.top_p_mass,
                    rewards=rewards,
                    reward=reward_functions[trained_reward].scaled(rewards[trained_reward]),
                )
            )
    return samples


def with_advantages(samples: Sequence[Sample], objective: ObjectiveConfig) -> list[Sample]:
    """The scored samples with A_i, centred within each prompt's group. fp64, so that equal rewards
    stay equal.

    A completion's KL is of the log-probabilities that the sampler recorded: the old ones of the
    first step are not known yet.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    groups = torch.tensor([sample.prompt for sample in samples])
    kl = torch.stack(
        [
            (sample.sampling_logprobs - sample.ref_logprobs)[sample.mask].double().sum()
            for sample in samples
        ]
    )
    advantages = group_advantages(rewards, groups, objective.scale_rewards, kl=kl, config=objective)
    return [
        replace(sample, advantage=float(advantage))
        for sample, advantage in zip(samples, advantages)
    ]


@dataclass(frozen=True)
class MicroBatch:
    """N samples padded to T completion tokens, as `grpo_loss` takes them: advantages [N], the
    log-probabilities [N,T], all fp32.
    """

    batch: Batch
    advantages: Tensor
    sampling_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    @property
    def mask(self) -> Tensor:
        return self.batch.completion_mask


def collate_samples(
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    pad_token_id: int,
    device: torch.device,
) -> MicroBatch:
    """Pad samples into one micro-batch on `device`; passes that have not been made yet are zeros."""
    batch = collate_rows(encoded_rows(samples, prompts), pad_token_id).to(device)
    width = batch.completion_mask.shape[1]

    def padded(name: str) -> Tensor:
        rows = torch.zeros(len(samples), width)
        for row, sample in zip(rows, samples):
            values = getattr(sample, name)
            if values is not None:
                row[: len(values)] = values
        return rows.to(device, non_blocking=True)  # [N,T]

    advantages = torch.tensor([sample.advantage for sample in samples]).to(
        device, non_blocking=True
    )
    return MicroBatch(
        batch,
        advantages,
        padded("sampling_logprobs"),
        padded("old_logprobs"),
        padded("ref_logprobs"),
    )


def score_samples(
    wrapped: nn.Module,
    model: LoadedModel,
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    steps: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float,
    with_reference: bool,
) -> list[Sample]:
    """The samples with log-probabilities of the frozen reference and old ones: of the policy as it
    is now.

    Without gradient, in eval() mode, micro-batch by micro-batch as planned (`plan_micro_batches`);
    computed once a rollout, whatever the number of updates. The samples of the first optimizer step
    get no old ones here: nothing has changed when that step runs them, so its own are the old ones
    (`with_old`).
    """
    device = next(wrapped.parameters()).device
    settings = {"temperature": temperature, "suppress_token_ids": model.suppressed_ids}
    scored = list(samples)
    was_training = wrapped.training
    wrapped.eval()
    for step, indices in (
        (step, indices) for step, micro_batches in enumerate(steps) for indices in micro_batches
    ):
        batch = collate_samples(
            [samples[i] for i in indices], prompts, model.encoder.pad_token_id, device
        ).batch
        if step > 0:
            with torch.no_grad():
                old, _ = completion_logprobs(wrapped, model.family, batch, **settings)  # [N,T]
            scored = with_old(scored, indices, old)
        if with_reference:
            with use_adapter(wrapped, REFERENCE):
                ref, _ = completion_logprobs(wrapped, model.family, batch, **settings)  # [N,T]
            ref = ref.cpu()
        for row, i in enumerate(indices):
            # at beta 0 not read
            of_reference = (
                ref[row, : len(samples[i].ids)] if with_reference else samples[i].sampling_logprobs
            )
            scored[i] = replace(scored[i], ref_logprobs=of_reference)
    wrapped.train(was_training)
    return scored


def with_old(samples: Sequence[Sample], indices: Sequence[int], logprobs: Tensor) -> list[Sample]:
    """The samples, of which those of a micro-batch have its log-probabilities [N,T] as old ones."""
    found = list(samples)
    for row, i in zip(logprobs.detach().cpu(), indices, strict=True):
        found[i] = replace(samples[i], old_logprobs=row[: len(samples[i].ids)])
    return found


def plan_micro_batches(
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    *,
    size: int,
    accumulation: int,
    max_tokens: int | None,
) -> list[list[list[int]]]:
    """For every optimizer step of one pass over the rollout, its micro-batches: each the indices of
    its samples, in order.

    A step has `accumulation` micro-batches of `size` samples, which are cut where they cost more
    than `max_tokens` tokens in a forward (see plan_batches); where a cut parts a group, its prompt
    is in both.
    """
    rows, per_step = encoded_rows(samples, prompts), size * accumulation
    return [
        [
            [start + i for i in indices]
            for indices in plan_batches(rows[start : start + per_step], size, max_tokens)
        ]
        for start in range(0, len(rows), per_step)
    ]


def encoded_rows(samples: Sequence[Sample], prompts: Sequence[EncodedPrompt]) -> list[EncodedRow]:
    return [EncodedRow(prompts[sample.prompt], sample.ids, sample.mask) for sample in samples]
