"""Make the samples of a rollout without a model."""

from __future__ import annotations

import torch

from data.answers import parse_answer
from data.examples import Example
from rl.rewards import Reward
from rl.rollout import Sample

CPU = torch.device("cpu")
ANSWERS = {
    1: "<think>a</think><solution>Edema</solution>",
    2: "<think>a</think><solution>Edema, Pneumonia</solution>",
    3: "no answer",
    4: "<solution>Edema</solution>",
}


def example(name: str = "e1", *labels: str) -> Example:
    return Example(name, "p1", "image.png", labels or ("Edema",), "site", CPU)


def sample(prompt: int, reward: float, length: int = 2, text: int = 1, **fields) -> Sample:
    values = dict(
        prompt=prompt,
        example=example(f"e{prompt}"),
        text=ANSWERS[text],
        answer=parse_answer(ANSWERS[text]),
        ids=torch.arange(1, length + 1),
        mask=torch.ones(length, dtype=torch.bool),
        truncated=False,
        sampling_logprobs=torch.full((length,), -1.0),
        top_p_mass=torch.ones(length),
        reward=reward,
        old_logprobs=torch.full((length,), -1.0),
        ref_logprobs=torch.full((length,), -1.5),
        rewards={"hard": Reward(reward, {"jaccard": reward, "length": 0.0})},
    )
    return Sample(**values | fields)
