"""Compute one step's gradients by several ranks and by one, for tests/ranks/test_gradients.py.

Both take the same micro-batches: some norms compute in fp32 whatever the weights are, so rows laid
out in another way would differ by more than their sum's order does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from engine.collate import collate_rows
from engine.encode import EncodedRow
from engine.launch import Launch
from engine.logprobs import token_logprobs
from engine.optim import clip_gradients
from engine.policy import Policy
from engine.ranks import Ranks
from rl.objective import ObjectiveConfig, grpo_loss, token_weights
from tests.helpers import tiny

PROMPT_COUNT, GROUP, MICRO = 4, 4, 4  # a micro-batch is a group
LONGEST = 24  # tokens of a completion
FAMILIES = ("qwen2_5_vl", "gemma3")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Mean(Ranks):
    """Divide the sum by the ranks, as DDP and FSDP do."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        super().sum_gradients(parameters)
        for parameter in parameters:
            parameter.grad /= self.size


class OwnTotal(Ranks):
    """Divide by a rank's own tokens: what others have is not asked for."""

    def gather(self, value):
        return [value]


class SkipsNone(Ranks):
    """Leave a parameter without gradient where a rank had none of its own."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        there = [parameter.grad is not None for parameter in parameters]
        super().sum_gradients(parameters)
        for parameter, is_there in zip(parameters, there, strict=True):
            parameter.grad = parameter.grad if is_there else None


MUTANTS = (Mean, OwnTotal, SkipsNone)


def rows_of(policy: Policy, images: Path) -> list[EncodedRow]:
    """Make groups of completions of random lengths, each of a prompt of its own."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for example in tiny.examples_of(images, *([56] * PROMPT_COUNT)):
        prompt = policy.encode(example)
        for _ in range(GROUP):
            length = int(torch.randint(3, LONGEST, (1,), generator=generator))
            ids = torch.randint(0, 200, (length,), generator=generator)
            rows.append(EncodedRow(prompt, ids, torch.ones(length, dtype=torch.bool)))
    return rows


def grpo(policy: Policy, rows: Sequence[EncodedRow], first: int, num_tokens: int) -> None:
    """Add a micro-batch's gradient of Eq. 2. first: of its rows in the step."""
    batch = collate_rows(rows, policy.encoder.pad_token_id)
    logprobs, entropy = policy.logprobs_and_entropy(batch)
    shifts = torch.stack(
        [
            torch.randn(logprobs.shape[1], generator=torch.Generator().manual_seed(first + i))
            for i in range(len(rows))
        ]
    ).to(logprobs.dtype)
    advantages = torch.linspace(-1, 1, PROMPT_COUNT * GROUP, dtype=torch.float64)
    weights = token_weights(
        batch.completion_mask,
        "dapo",
        num_completions=PROMPT_COUNT * GROUP,
        num_tokens=num_tokens,
        max_completion_length=LONGEST,
        dtype=logprobs.dtype,
    )
    loss, _ = grpo_loss(
        logprobs,
        logprobs.detach() + 0.1 * shifts,
        logprobs.detach() - 0.05,
        advantages[first : first + len(rows)].to(logprobs.dtype),
        batch.completion_mask,
        weights,
        ObjectiveConfig(loss_type="dapo"),
        entropy=entropy,
    )
    loss.backward()


def sft(policy: Policy, rows: Sequence[EncodedRow], first: int, num_tokens: int) -> None:
    """Add a micro-batch's gradient of Eq. 1."""
    batch = collate_rows(rows, policy.encoder.pad_token_id)
    hidden, targets = policy.hidden_states(batch)
    logprobs, _ = token_logprobs(hidden, policy.head, targets)
    (-logprobs.sum() / num_tokens).backward()


def gradient(
    policy: Policy, rows: Sequence[EncodedRow], ranks: Ranks, micro: int, backward: Callable
) -> torch.Tensor:
    """Compute the gradient of a step -> all of it [P], as the ranks' loops do."""
    policy.net.zero_grad(set_to_none=True)
    policy.net.train()
    blocks = ranks.share(len(rows) // micro)
    own = range(blocks.start * micro, blocks.stop * micro)
    num_tokens = sum(ranks.gather(sum(len(rows[row].completion_ids) for row in own)))
    for first in own[::micro]:
        backward(policy, rows[first : first + micro], first, num_tokens)
    ranks.sum_gradients(policy.parameters)
    clip_gradients(policy.parameters, 1e9)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in policy.parameters
        ]
    )


def compare(folder: str) -> None:
    """Print how far several ranks' gradient is from one's, for each family, precision and loss.

    folder: of the models and images, which another process has made.
    """
    torch.set_num_threads(1)
    with Ranks(Launch.of()) as ranks:
        for family in FAMILIES:
            for name, dtype in DTYPES.items():
                base = tiny.load(Path(folder) / family, dtype=dtype)
                net = tiny.attach_random_adapter(base)
                for part, parameter in net.named_parameters():
                    if "lora_" in part:
                        parameter.data = parameter.data.to(dtype)
                policy = tiny.policy_of(net, base, temperature=0.8)
                rows = rows_of(policy, Path(folder) / "images")
                for kind, backward in (("grpo", grpo), ("sft", sft)):
                    _told(ranks, policy, rows, MICRO, backward, f"{family} {name} {kind}")
                # a last step with fewer rows than ranks
                short = rows[: ranks.size - 1]
                _told(ranks, policy, short, 1, sft, f"{family} {name} short sft")


def _told(
    ranks: Ranks,
    policy: Policy,
    rows: Sequence[EncodedRow],
    micro: int,
    backward: Callable,
    about: str,
) -> None:
    """Compare, with the ranks as they are and with each mutant of them."""
    alone = gradient(policy, rows, Ranks(), micro, backward)
    told: dict[str, object] = {"about": about}
    plain, kind = ranks.gather_tensors, type(ranks)
    for mutant in (Ranks, *MUTANTS) if "qwen" in about and "float32" in about else (Ranks,):
        ranks.__class__ = mutant
        found = gradient(policy, rows, ranks, micro, backward)
        ranks.__class__ = kind
        everywhere = plain({"gradient": found})
        told[mutant.__name__] = {
            "relative": float((found - alone).abs().max() / alone.abs().max()),
            "equal on all": all(torch.equal(one["gradient"], found) for one in everywhere),
        }
    print(json.dumps(told), flush=True)
