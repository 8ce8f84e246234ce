"""Make the samples of a rollout without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from data.answers import parse_answer
from data.examples import Example
from engine.encode import EncodedPrompt
from rl.objective import group_advantages
from rl.rewards import Reward
from rl.rollout import Rollouts
from rl.samples import Sample
from rl.settings import GRPOConfig

CPU = torch.device("cpu")
ANSWERS = {
    1: "<think>a</think><solution>Edema</solution>",
    2: "<think>a</think><solution>Edema, Pneumonia</solution>",
    3: "no answer",
    4: "<solution>Edema</solution>",
}


def example(name: str = "e1", *labels: str) -> Example:
    return Example(name, "p1", "image.png", labels or ("Edema",), "site", CPU)


def sample(group: int, reward: float, length: int = 2, text: int = 1, **fields) -> Sample:
    values = dict(
        group=group,
        example=example(f"e{group}"),
        text=ANSWERS[text],
        answer=parse_answer(ANSWERS[text]),
        ids=torch.arange(1, length + 1),
        mask=torch.ones(length, dtype=torch.bool),
        truncated=False,
        text_length=length,
        sampling_logprobs=torch.full((length,), -1.0),
        top_p_mass=torch.ones(length),
        reward=reward,
        old_logprobs=torch.full((length,), -1.0),
        ref_logprobs=torch.full((length,), -1.5),
        rewards={"hard": Reward(reward, {"jaccard": reward, "length": 0.0})},
    )
    return Sample(**values | fields)


def prompt_of(length: int) -> EncodedPrompt:
    """Make a prompt of so many tokens, without an image."""
    return EncodedPrompt(
        torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long), {}
    )


def rollouts_of(
    samples: Sequence[Sample], prompts: Sequence[EncodedPrompt] = (), **settings: Any
) -> Rollouts:
    """Make a rollout at hand of these samples. settings: fields of GRPOConfig."""
    rollouts = Rollouts([], {}, GRPOConfig(**settings))
    rollouts.samples, rollouts.prompts = list(samples), list(prompts)
    return rollouts


def advantages_of(
    samples: Sequence[Sample], objective: Any, function: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """Compute A_i [R] as run_grpo.py's block 5 does. objective, function: a fork's, or ours."""
    rollouts = rollouts_of(samples)
    return (function or group_advantages)(
        rollouts.rewards,
        rollouts.groups,
        objective.scale_rewards,
        kl=rollouts.kl,
        config=objective,
    )
