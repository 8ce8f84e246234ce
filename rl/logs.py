"""What is kept of a rollout: its metrics, its rows in completions.jsonl, a look at it in
TensorBoard, its state in a checkpoint; and what is noted of an evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from data.answers import parse_answer
from data.examples import Example
from data.images import load_image
from data.labels import Target
from engine.run import TrainerState
from engine.tracking import RunLogger, escape_markdown
from rl.conditions import parse_combination
from rl.objective import ZERO_VARIANCE
from rl.rewards import Reward, RewardFunction
from rl.rollout import Sample

LOWER_IS_BETTER = ("gap", "fail_rate", "invalid_rate")  # of the evaluated metrics


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What to log of a rollout, under TRL's names.

    reward is the number trained on (scaled); rewards/<name>/mean and its parts are in the reward's
    own units. reward_std is over the rollout, reward_group_std the mean within groups;
    frac_reward_zero_std the share of groups that give no policy gradient.
    """
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    prompts = torch.tensor([sample.prompt for sample in samples])
    groups = [rewards[prompts == prompt] for prompt in prompts.unique()]
    lengths = torch.tensor([float(len(sample.ids)) for sample in samples])
    terminated = lengths[torch.tensor([not sample.truncated for sample in samples])]
    distinct = [
        len({sample.text for sample in samples if sample.prompt == prompt})
        for prompt in prompts.unique().tolist()
    ]
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_group_std": torch.stack([group.std() for group in groups]).mean(),
        "frac_reward_zero_std": (
            sum(bool(group.max() - group.min() <= ZERO_VARIANCE) for group in groups) / len(groups)
        ),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - len(terminated) / len(samples),
        "completions/valid_rate": sum(sample.answer.valid for sample in samples) / len(samples),
        "completions/parsed_rate": sum(sample.answer.parsed for sample in samples) / len(samples),
        "completions/distinct_per_group": sum(distinct) / len(distinct),
        "completions/mean_labels": (
            sum(len(sample.answer.labels) for sample in samples) / len(samples)
        ),
        "sampling/top_p_mass_mean": torch.cat([sample.top_p_mass for sample in samples]).mean(),
    }
    if len(terminated):
        metrics |= {
            "completions/mean_terminated_length": terminated.mean(),
            "completions/min_terminated_length": terminated.min(),
            "completions/max_terminated_length": terminated.max(),
        }
    for name in samples[0].rewards:
        totals = torch.tensor(
            [sample.rewards[name].total for sample in samples], dtype=torch.float64
        )
        metrics |= {f"rewards/{name}/mean": totals.mean(), f"rewards/{name}/std": totals.std()}
        for part in samples[0].rewards[name].parts:
            metrics[f"rewards/{name}/{part}"] = sum(
                sample.rewards[name].parts[part] for sample in samples
            ) / len(samples)
    return {name: float(value) for name, value in metrics.items()}


def mismatch_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the training forward's; in fp32 some 1e-6,
    in bf16 some 1e-3. Once the old ones of all samples are known.
    """
    kept = [sample for sample in samples if sample.mask.all()]
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
            "id": sample.example.id,
            "group": sample.prompt,
            "image": sample.example.image,
            "labels": sorted(sample.example.target.labels),
            "completion": sample.text,
            "completion_length": len(sample.ids),
            "truncated": sample.truncated,
            "predicted": list(sample.answer.labels),
            "valid": sample.answer.valid,
            "problem": sample.answer.problem,
            "rewards": {
                name: {"total": reward.total} | reward.parts
                for name, reward in sample.rewards.items()
            },
            "reward": sample.reward,
            "advantage": sample.advantage,
        }
        for sample in samples
    ]


def show_samples(
    log: RunLogger, samples: Sequence[Sample], step: int, *, max_side: int = 448
) -> None:
    """One group in TensorBoard: the X-ray, and a table of its completions with rewards and
    advantages. Model text is escaped.
    """
    example = samples[0].example
    image = load_image(example).convert("L")
    image.thumbnail((max_side, max_side))
    log.image("completions/image", np.asarray(image), step)
    names = list(samples[0].rewards)
    lines = [
        (
            f"{escape_markdown(example.id)}, labels:"
            f" {escape_markdown(', '.join(sorted(example.target.labels)) or '(none)')}"
        ),
        "",
        "| completion | " + " | ".join(names) + " | advantage |",
        "|---" * (len(names) + 2) + "|",
    ]
    for sample in samples:
        totals = " | ".join(f"{sample.rewards[name].total:.2f}" for name in names)
        lines.append(f"| {escape_markdown(sample.text)} | {totals} | {sample.advantage:+.2f} |")
    log.text("completions/text", "\n".join(lines), step)


PER_TOKEN = ("ids", "mask", "sampling_logprobs", "top_p_mass", "old_logprobs", "ref_logprobs")


def pack_samples(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[dict]]:
    """(tensors, record): a rollout in the middle of its updates, for a checkpoint. Python's
    floats survive JSON bit for bit.
    """
    tensors = (
        {name: torch.cat([getattr(sample, name) for sample in samples]) for name in PER_TOKEN}
        if samples
        else {}
    )
    record = [
        {
            "prompt": sample.prompt,
            "example": sample.example.id,
            "length": len(sample.ids),
            "truncated": sample.truncated,
            "rewards": {
                name: {"total": reward.total, "parts": reward.parts}
                for name, reward in sample.rewards.items()
            },
            "reward": sample.reward,
            "advantage": sample.advantage,
        }
        for sample in samples
    ]
    return tensors, record


def unpack_samples(
    tensors: dict[str, Tensor],
    record: list[dict],
    examples: Sequence[Example],
    decode: Callable[[Tensor], str],
    answer_format: str,
) -> list[Sample]:
    """What `pack_samples` packed; text and answer are made again from the ids."""
    by_id = {example.id: example for example in examples}
    lengths = [row["length"] for row in record]
    pieces = {name: tensor.split(lengths) for name, tensor in tensors.items()}
    samples = []
    for i, row in enumerate(record):
        text = decode(pieces["ids"][i])
        rewards = {
            name: Reward(total=reward["total"], parts=reward["parts"])
            for name, reward in row["rewards"].items()
        }
        samples.append(
            Sample(
                prompt=row["prompt"],
                example=by_id[row["example"]],
                text=text,
                answer=parse_answer(text, answer_format),
                truncated=row["truncated"],
                rewards=rewards,
                reward=row["reward"],
                advantage=row["advantage"],
                **{name: pieces[name][i] for name in PER_TOKEN},
            )
        )
    return samples


# ---- evaluation ----------------------------------------------------------------------------------
def with_rewards(
    rows: Sequence[dict], reward_functions: Mapping[str, RewardFunction]
) -> list[dict]:
    """The rows of a predictions file, each with its "rewards" as in completions.jsonl: {name:
    {"total", its parts}}.

    Nothing is observed: the windows stay those of the rollouts.
    """
    rewarded = []
    for row in rows:
        answer = parse_answer(row["completion"], row["answer_format"])
        target = Target(
            frozenset(row["labels"]) & frozenset(row["evaluated_labels"]),
            frozenset(row["evaluated_labels"]),
        )
        rewards = {
            name: function(answer, target, row["completion_length"])
            for name, function in reward_functions.items()
        }
        rewarded.append(
            row
            | {
                "rewards": {
                    name: {"total": reward.total} | reward.parts for name, reward in rewards.items()
                }
            }
        )
    return rewarded


def mean_rewards(
    rows: Sequence[dict], trained_reward: str, function: RewardFunction
) -> dict[str, float]:
    """Means over rows of `with_rewards`: `rewards/<name>/mean` in the reward's own units, `reward`
    as it is trained on.
    """
    means = Counter()
    for row in rows:
        for name, reward in row["rewards"].items():
            means[f"rewards/{name}/mean"] += reward["total"] / len(rows)
        means["reward"] += function.scaled(
            Reward(row["rewards"][trained_reward]["total"], {})
        ) / len(rows)
    return dict(means)


def record_evaluation(
    metrics: Mapping[str, dict[str, float]], log: RunLogger, state: TrainerState, chosen: str | None
) -> dict[str, float]:
    """Log the metrics of each set and the gap between them, and note whether this checkpoint is the
    best; returns them by NAME/METRIC, and the gap.

    gap: how much more macro-F1 the first set (hospital) has gained since the run's first evaluation
    than the others have on average, each over its own labels. Above 0, part of the gain does not
    transfer. chosen: what the best is chosen by (--metric_for_best_model); None for the first set's
    macro_f1.
    """
    names = list(metrics)
    for name in names:
        log.scalars(state.global_step, metrics[name], split="eval", dataset=name, epoch=state.epoch)
    flat = {f"{name}/{key}": value for name in names for key, value in metrics[name].items()}
    if len(names) > 1:
        start = {
            name: next(
                entry[f"eval_{name}_macro_f1"]
                for entry in log.log_history
                if f"eval_{name}_macro_f1" in entry
            )
            for name in names
        }
        first, *others = (metrics[name]["macro_f1"] - start[name] for name in names)
        flat["gap"] = first - sum(others) / len(others)
        log.scalars(state.global_step, {"gap": flat["gap"]}, split="eval", epoch=state.epoch)
    if names:
        combination = parse_combination(chosen or f"{names[0]}/macro_f1")
        single = combination.terms[0][1].rpartition("/")[2] if len(combination.terms) == 1 else None
        state.record_evaluation(
            combination.value(flat), greater_is_better=single not in LOWER_IS_BETTER
        )
    return flat
