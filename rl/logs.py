"""Log a rollout: its metrics, its rows in completions.jsonl, a look at it in TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.files import DataError
from data.hospitals import Hospital
from data.images import load_image
from data.predictions import Prediction
from engine.charts import ITSELF, SHARE, Chart, macro_f1_chart
from engine.markdown import escape_markdown
from engine.tracking import RunLogger
from rl.objective import ZERO_VARIANCE, Metric
from rl.rewards import rewards_record
from rl.samples import Sample, of_hospital
from rl.settings import BY_HOSPITAL, SHARE_OF_PROMPTS


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Measure a rollout, under TRL's names.

    reward: mean of the number that is trained on (scaled).
    reward_std: over the whole rollout. reward_group_std: mean over the groups.
    frac_reward_zero_std: share of groups that give no policy gradient.
    rewards/<name>/mean and the parts of a reward: in the reward's own units.
    """
    group_of = torch.tensor([sample.group for sample in samples])
    lengths = torch.tensor([float(len(sample.ids)) for sample in samples])
    terminated = lengths[torch.tensor([not sample.truncated for sample in samples])]
    distinct = [
        len({sample.text for sample in samples if sample.group == group})
        for group in group_of.unique().tolist()
    ]
    metrics: dict[str, Tensor | float] = {
        **_reward_metrics(samples),
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
        for part in dict.fromkeys(p for sample in samples for p in sample.rewards[name].parts):
            metrics[f"rewards/{name}/{part}"] = sum(
                sample.rewards[name].parts.get(part, 0.0) for sample in samples
            ) / len(samples)
    return {name: float(value) for name, value in metrics.items()}


def _reward_metrics(samples: Sequence[Sample]) -> dict[str, Tensor | float]:
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    group_of = torch.tensor([sample.group for sample in samples])
    groups = [rewards[group_of == group] for group in group_of.unique()]
    return {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_group_std": torch.stack([group.std() for group in groups]).mean(),
        "frac_reward_zero_std": (
            sum(bool(group.max() - group.min() <= ZERO_VARIANCE) for group in groups) / len(groups)
        ),
    }


def hospital_metrics(samples: Sequence[Sample], hospitals: Sequence[Hospital]) -> dict[str, Metric]:
    """Measure what each hospital of a rollout earns, where there are several of them.

    reward, reward_group_std, frac_reward_zero_std: as in `rollout_metrics`, of its own completions.
    share_of_prompts: of the rollout's. Weighted by its prompts, so that the rollouts between two
    logs combine to one mean over prompts. A hospital without a prompt has its share of 0 alone.

    hospitals: those of the training data.
    """
    metrics: dict[str, Metric] = {}
    if len(hospitals) < 2:
        return metrics
    prompts = len({sample.group for sample in samples})
    for hospital in hospitals:
        own = [sample for sample in samples if sample.example.hospital == hospital]
        own_prompts = len({sample.group for sample in own})
        measured = _reward_metrics(own) if own else {}
        for name, value in (measured | {SHARE_OF_PROMPTS: own_prompts / prompts}).items():
            if name in BY_HOSPITAL:
                weight = prompts if name == SHARE_OF_PROMPTS else own_prompts
                metrics[f"{name}/{hospital}"] = Metric(torch.as_tensor(value), weight, "mean")
    return metrics


def mismatch_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Measure how far the sampler's log-probabilities are from the training forward's.

    In fp32 they differ by some 1e-6, in bf16 by some 1e-3. The old log-probabilities of all samples
    are needed. sampling/ratio is pi_old / sampler a token, as it is: TRL's
    importance_sampling_ratio is what is left after its truncation.
    """
    kept = [sample for sample in samples if sample.mask.all()]
    if not kept:
        return {}
    difference = torch.cat([sample.old_logprobs - sample.sampling_logprobs for sample in kept])
    ratio = difference.exp()
    return {
        "sampling/sampling_logp_difference/mean": float(difference.abs().mean()),
        "sampling/sampling_logp_difference/max": float(difference.abs().max()),
        "sampling/ratio/min": float(ratio.min()),
        "sampling/ratio/mean": float(ratio.mean()),
        "sampling/ratio/max": float(ratio.max()),
    }


def completion_rows(samples: Sequence[Sample], prompt: str, answer_format: str) -> list[dict]:
    """Make the rows of completions.jsonl: those of a predictions file, and what a rollout adds.

    With the same keys, `python -m eval.evaluate --predictions` scores rollouts again.

    prompt: name of the instruction. answer_format: how the completions were parsed.
    """
    return [
        Prediction.of_example(
            sample.example,
            prompt=prompt,
            completion=sample.text,
            completion_length=len(sample.ids),
            answer_format=answer_format,
            answer=sample.answer,
            extra={
                **of_hospital(sample.example),
                "group": sample.group,
                "image": sample.example.image,
                "truncated": sample.truncated,
                "text_length": sample.text_length,
                "rewards": rewards_record(sample.rewards),
                "reward": sample.reward,
                "advantage": sample.advantage,
            },
        ).to_row()
        for sample in samples
    ]


def grpo_charts(data_sets: Sequence[str], hospitals: Sequence[Hospital] = ()) -> list[Chart]:
    """List the charts of a GRPO run in TensorBoard.

    data_sets: those evaluated, home first. hospitals: those trained on.
    """
    several = hospitals if len(hospitals) > 1 else ()
    sampled = {f"{hospital}, sampled": f"train/reward/{hospital}" for hospital in several}
    charts = [
        Chart(
            "reward",
            "reward: sampled, and greedy by set",
            {ITSELF: "train/reward"}
            | sampled
            | {name: f"eval/{name}/reward" for name in data_sets},
            SHARE,
        ),
        macro_f1_chart(data_sets),
        Chart(
            "gap_shared",
            "gap_shared, band of 2 standard errors",
            {ITSELF: "eval/gap_shared"},
            (-0.1, 0.1),
            error="eval/gap_shared_se",
        ),
        Chart(
            "kl_and_entropy",
            "KL and entropy, nats a token",
            {"KL": "train/kl", "entropy": "train/entropy"},
            (0.0,),
        ),
        Chart(
            "valid_and_truncated",
            "share of answers valid, and truncated",
            {
                "valid": "train/completions/valid_rate",
                "truncated": "train/completions/clipped_ratio",
            },
            SHARE,
        ),
        Chart(
            "length",
            "length of completions, tokens",
            {ITSELF: "train/completions/mean_length"},
            (0.0,),
        ),
    ]
    return [chart for chart in charts if chart.curves and (len(data_sets) > 1 or not chart.error)]


def largest_spread(samples: Sequence[Sample]) -> tuple[list[Sample], str]:
    """Choose the group whose rewards differ most -> (its samples, a sentence on the choice).

    The spread is the largest less the smallest reward as trained on. Of several equal ones the
    first in the rollout is taken, and the sentence says how many there are.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    spreads = {
        group: max(sample.reward for sample in members) - min(sample.reward for sample in members)
        for group, members in groups.items()
    }
    largest = max(spreads.values())
    tied = [group for group, spread in spreads.items() if largest - spread <= ZERO_VARIANCE]
    if largest <= ZERO_VARIANCE:
        why = f"the first of {len(groups)} groups, in none of which rewards differ"
    elif len(tied) > 1:
        why = f"the first of {len(tied)} groups (of {len(groups)}) with the largest spread of"
        why += f" rewards, {largest:.3g}"
    else:
        why = f"of {len(groups)} groups the one with the largest spread of rewards, {largest:.3g}"
    return groups[tied[0]], why


def show_samples(
    log: RunLogger, samples: Sequence[Sample], step: int, *, max_side: int = 448
) -> None:
    """Show one group of a rollout in TensorBoard: the X-ray, its completions, their rewards.

    It is the group with the largest spread of rewards, from which the policy learns most. The
    model's text is escaped. There is no table, whose narrow columns would break words. An image
    that can no longer be read is left out: the step is made.

    samples: the whole rollout. max_side: of the picture, pixels.
    """
    group, why = largest_spread(samples)
    example = group[0].example
    with contextlib.suppress(DataError):
        image = load_image(example).convert("L")
        image.thumbnail((max_side, max_side))
        log.image("completions/image", np.asarray(image), step)
    lines = [
        f"**{escape_markdown(example.id)}**, true labels:"
        f" **{escape_markdown(', '.join(sorted(example.target.labels)) or '(none)')}**",
        "",
        f"Shown is {why}.",
    ]
    for number, sample in enumerate(group, start=1):
        totals = [
            f"{escape_markdown(name)} {reward.total:.2f}" for name, reward in sample.rewards.items()
        ]
        facts = [*totals, f"advantage {sample.advantage:+.2f}", f"{len(sample.ids)} tokens"]
        if sample.truncated:
            facts.append("truncated")
        # in quotes, so that a text that begins with a dash or a blank begins no list and no code
        text = f"&ldquo;{escape_markdown(sample.text)}&rdquo;"
        lines += ["", f"{number}. **{' &middot; '.join(facts)}**", "", f"    {text}"]
    log.text("completions/text", "\n".join(lines), step)
