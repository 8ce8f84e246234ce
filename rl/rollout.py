"""One rollout: G completions of each prompt with rewards, advantages, old and reference log-probabilities, and its micro-batches.

A rollout is a list of `Sample`s on the CPU, one a completion, padded only when a micro-batch is made of them. The micro-batches are
planned once: the old, reference and policy passes run on the same rows padded in the same way, so before the first update the ratio is
exactly 1 and the KL exactly 0.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.answers import Answer, parse_answer
from data.collate import Batch, collate_rows
from data.encode import EncodedPrompt, EncodedRow
from data.records import Example
from engine.forward import completion_logprobs
from engine.generate import Completion
from engine.model import REFERENCE, LoadedModel, use_adapter
from rl.objective import ZERO_VARIANCE, group_advantages
from rl.rewards import Reward, RewardFunction


@dataclass(frozen=True)
class Sample:
    """One completion with all that the objective needs of it.

    prompt: index of its prompt in the rollout, which is its group. ids [C] int64; mask [C] bool, all false where a truncated completion is
    left out of the loss; sampling_logprobs, top_p_mass, old_logprobs, ref_logprobs [C] fp32. rewards: every reward by
    name. reward: what is trained on, scaled. advantage: A_i.
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

    All rewards are computed from the windows as they stood before this rollout; `observe` is the caller's to call, once, afterwards.
    """
    samples = []
    for index, (example, group) in enumerate(zip(examples, completions, strict=True)):
        for completion in group:
            text = decode(completion.ids)
            answer = parse_answer(text, answer_format)
            rewards = {name: function(answer, example.target, len(completion.ids)) for name, function in reward_functions.items()}
            mask = torch.full((len(completion.ids),), not (completion.truncated and mask_truncated_completions))
            samples.append(Sample(
                prompt=index, example=example, text=text, answer=answer, ids=completion.ids, mask=mask, truncated=completion.truncated,
                sampling_logprobs=completion.logprobs, top_p_mass=completion.top_p_mass, rewards=rewards,
                reward=reward_functions[trained_reward].scaled(rewards[trained_reward])))
    return samples


def with_advantages(samples: Sequence[Sample], scale_rewards: str) -> list[Sample]:
    """The samples with A_i, centred within each prompt's group. fp64, so that equal rewards stay equal."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    groups = torch.tensor([sample.prompt for sample in samples])
    advantages = group_advantages(rewards, groups, scale_rewards)
    return [replace(sample, advantage=float(advantage)) for sample, advantage in zip(samples, advantages)]


@dataclass(frozen=True)
class MicroBatch:
    """N samples padded to T completion tokens, as `grpo_loss` takes them: advantages [N], the log-probabilities [N,T], all fp32."""

    batch: Batch
    advantages: Tensor
    sampling_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    @property
    def mask(self) -> Tensor:
        return self.batch.completion_mask


def collate_samples(samples: Sequence[Sample], prompts: Sequence[EncodedPrompt], pad_token_id: int, device: torch.device) -> MicroBatch:
    """Pad samples into one micro-batch on `device`; passes that have not been made yet are zeros."""
    batch = collate_rows([EncodedRow(prompts[sample.prompt], sample.ids, sample.mask) for sample in samples], pad_token_id).to(device)
    width = batch.completion_mask.shape[1]

    def padded(name: str) -> Tensor:
        rows = torch.zeros(len(samples), width)
        for row, sample in zip(rows, samples):
            values = getattr(sample, name)
            if values is not None:
                row[: len(values)] = values
        return rows.to(device)  # [N,T]

    advantages = torch.tensor([sample.advantage for sample in samples], device=device)
    return MicroBatch(batch, advantages, padded("sampling_logprobs"), padded("old_logprobs"), padded("ref_logprobs"))


def score_samples(
    wrapped: nn.Module,
    model: LoadedModel,
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    micro_batches: Sequence[Sequence[int]],
    *,
    temperature: float,
    with_reference: bool,
) -> list[Sample]:
    """The samples with old log-probabilities (the policy as it is now) and those of the frozen reference.

    Without gradient, in eval() mode, micro-batch by micro-batch as planned; computed once a rollout, whatever the number of updates.
    """
    device = next(wrapped.parameters()).device
    settings = {"temperature": temperature, "suppress_token_ids": model.suppressed_ids}
    scored = list(samples)
    was_training = wrapped.training
    wrapped.eval()
    for indices in micro_batches:
        batch = collate_samples([samples[i] for i in indices], prompts, model.encoder.pad_token_id, device).batch
        with torch.no_grad():
            old, _ = completion_logprobs(wrapped, model.family, batch, **settings)  # [N,T]
        ref = old
        if with_reference:
            with use_adapter(wrapped, REFERENCE):
                ref, _ = completion_logprobs(wrapped, model.family, batch, **settings)  # [N,T]
        for row, i in enumerate(indices):
            length = len(samples[i].ids)
            scored[i] = replace(samples[i], old_logprobs=old[row, :length].cpu(), ref_logprobs=ref[row, :length].cpu())
    wrapped.train(was_training)
    return scored


def plan_micro_batches(num_samples: int, micro_batch_size: int) -> list[list[int]]:
    """Indices of the samples of every micro-batch of one rollout, in order; samples of a prompt stay together where they fit."""
    return [list(range(start, min(start + micro_batch_size, num_samples))) for start in range(0, num_samples, micro_batch_size)]


# ---- metrics and records of a rollout -------------------------------------------------------------------------------
def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What to log of a rollout, under TRL's names.

    reward is the number trained on (scaled); rewards/<name>/mean and its parts are in the reward's own units. reward_std is over the
    rollout, reward_group_std the mean within groups; frac_reward_zero_std the share of groups that give no policy gradient.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    prompts = torch.tensor([sample.prompt for sample in samples])
    groups = [rewards[prompts == prompt] for prompt in prompts.unique()]
    lengths = torch.tensor([float(len(sample.ids)) for sample in samples])
    terminated = lengths[torch.tensor([not sample.truncated for sample in samples])]
    distinct = [len({sample.text for sample in samples if sample.prompt == prompt}) for prompt in prompts.unique().tolist()]
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_group_std": torch.stack([group.std() for group in groups]).mean(),
        "frac_reward_zero_std": sum(bool(group.max() - group.min() <= ZERO_VARIANCE) for group in groups) / len(groups),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - len(terminated) / len(samples),
        "completions/valid_rate": sum(sample.answer.valid for sample in samples) / len(samples),
        "completions/parsed_rate": sum(sample.answer.parsed for sample in samples) / len(samples),
        "completions/distinct_per_group": sum(distinct) / len(distinct),
        "completions/mean_labels": sum(len(sample.answer.labels) for sample in samples) / len(samples),
        "sampling/top_p_mass_mean": torch.cat([sample.top_p_mass for sample in samples]).mean(),
    }
    if len(terminated):
        metrics |= {"completions/mean_terminated_length": terminated.mean(), "completions/min_terminated_length": terminated.min(),
                    "completions/max_terminated_length": terminated.max()}
    for name in samples[0].rewards:
        totals = torch.tensor([sample.rewards[name].total for sample in samples], dtype=torch.float64)
        metrics |= {f"rewards/{name}/mean": totals.mean(), f"rewards/{name}/std": totals.std()}
        for part in samples[0].rewards[name].parts:
            metrics[f"rewards/{name}/{part}"] = sum(sample.rewards[name].parts[part] for sample in samples) / len(samples)
    return {name: float(value) for name, value in metrics.items()} | mismatch_metrics(samples)


def mismatch_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the training forward's; in fp32 some 1e-6, in bf16 some 1e-3."""
    kept = [sample for sample in samples if sample.old_logprobs is not None and sample.mask.all()]
    if not kept:
        return {}
    difference = torch.cat([sample.old_logprobs - sample.sampling_logprobs for sample in kept])
    ratio = difference.exp()
    return {
        "sampling/sampling_logp_difference/mean": float(difference.abs().mean()),
        "sampling/sampling_logp_difference/max": float(difference.abs().max()),
        "sampling/importance_sampling_ratio/min": float(ratio.min()),
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
        "sampling/importance_sampling_ratio/max": float(ratio.max()),
    }


def completion_rows(samples: Sequence[Sample]) -> list[dict]:
    """Rows of completions.jsonl."""
    return [
        {
            "id": sample.example.id, "group": sample.prompt, "image": sample.example.image, "labels": sorted(sample.example.target.labels),
            "completion": sample.text, "completion_length": len(sample.ids), "truncated": sample.truncated,
            "predicted": list(sample.answer.labels), "valid": sample.answer.valid, "problem": sample.answer.problem,
            "rewards": {name: {"total": reward.total} | reward.parts for name, reward in sample.rewards.items()},
            "reward": sample.reward, "advantage": sample.advantage,
        }
        for sample in samples
    ]


# ---- a rollout in a checkpoint --------------------------------------------------------------------------------------
_PER_TOKEN = ("ids", "mask", "sampling_logprobs", "top_p_mass", "old_logprobs", "ref_logprobs")


def pack_samples(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[dict]]:
    """(tensors, document): a rollout in the middle of its updates, for a checkpoint. Python's floats survive JSON bit for bit."""
    tensors = {name: torch.cat([getattr(sample, name) for sample in samples]) for name in _PER_TOKEN} if samples else {}
    document = [
        {
            "prompt": sample.prompt, "example": sample.example.id, "length": len(sample.ids), "truncated": sample.truncated,
            "rewards": {name: {"total": reward.total, "parts": reward.parts} for name, reward in sample.rewards.items()},
            "reward": sample.reward, "advantage": sample.advantage,
        }
        for sample in samples
    ]
    return tensors, document


def unpack_samples(
    tensors: dict[str, Tensor], document: list[dict], examples: Sequence[Example], decode: Callable[[Tensor], str], answer_format: str
) -> list[Sample]:
    """What `pack_samples` packed; text and answer are made again from the ids."""
    by_id = {example.id: example for example in examples}
    lengths = [row["length"] for row in document]
    pieces = {name: tensor.split(lengths) for name, tensor in tensors.items()}
    samples = []
    for i, row in enumerate(document):
        text = decode(pieces["ids"][i])
        rewards = {name: Reward(total=reward["total"], parts=reward["parts"]) for name, reward in row["rewards"].items()}
        samples.append(Sample(
            prompt=row["prompt"], example=by_id[row["example"]], text=text, answer=parse_answer(text, answer_format), truncated=row["truncated"],
            rewards=rewards, reward=row["reward"], advantage=row["advantage"], **{name: pieces[name][i] for name in _PER_TOKEN}))
    return samples
