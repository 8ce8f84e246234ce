"""Hold the completions of a rollout, one `Sample` each, and pad some of them to a micro-batch.

Samples lie on the CPU and are padded only when a micro-batch is made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.answers import Answer, parse_answer
from data.examples import Example
from engine.collate import Batch, collate_rows
from engine.completion import Completion
from engine.device import on_device
from engine.encode import EncodedPrompt, EncodedRow
from engine.time_limit import TimeLimit
from rl.reward_checks import UNLIMITED, Completed, all_rewards, trained_number
from rl.rewards import Reward, RewardFunction

# Fields of a sample with one value a token: a checkpoint packs them, --dump_step writes them.
PER_TOKEN = ("ids", "mask", "sampling_logprobs", "top_p_mass", "old_logprobs", "ref_logprobs")


@dataclass
class Sample:
    """Hold one completion with all that the objective needs of it.

    `Rollouts` fills in the last three fields, each at one named place. They are zero until then.

    group: index of the completion's prompt in the rollout.
    ids [C] int64: its tokens, the stop token included.
    mask [C] bool: all true, or all false where a truncated completion is left out of the loss.
    text_length: tokens that are neither blank nor filler, the stop token included.
    sampling_logprobs [C] fp32: log pi as the sampler recorded it.
    top_p_mass [C] fp32: probability of the nucleus that each token was drawn from.
    rewards: every reward by name.
    reward: the one that is trained on, scaled: R_i.
    advantage: A_i of Eq. 2, by `Rollouts.set_advantages`.
    ref_logprobs [C] fp32: log pi_ref, by `Rollouts.score`.
    old_logprobs [C] fp32: log pi_old, by `Rollouts.score` and `Rollouts.keep_old`.
    """

    group: int
    example: Example
    text: str
    answer: Answer
    ids: Tensor
    mask: Tensor
    truncated: bool
    text_length: int
    sampling_logprobs: Tensor
    top_p_mass: Tensor
    rewards: dict[str, Reward]
    reward: float
    advantage: float = 0.0
    ref_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    old_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))

    def row(self, prompts: Sequence[EncodedPrompt]) -> EncodedRow:
        """Join the completion to its prompt, as collation takes it."""
        return EncodedRow(prompts[self.group], self.ids, self.mask)


def build_samples(
    examples: Sequence[Example],
    completions: Sequence[Sequence[Completion]],
    decode: Callable[[Tensor], str],
    reward_functions: dict[str, RewardFunction],
    trained_reward: str,
    *,
    answer_format: str,
    mask_truncated_completions: bool,
    text_length: Callable[[Tensor], int],
    length_of: str,
    limit: TimeLimit = UNLIMITED,
) -> list[Sample]:
    """Parse and reward every completion, in the prompts' order and those of one prompt together.

    All rewards are computed from the windows as they stood before this rollout. The caller calls
    `observe` afterwards, once.

    completions: those of each example, in the examples' order.
    decode: turns ids [C] into text.
    trained_reward: the name among `reward_functions` whose scaled value becomes `reward`.
    text_length: counts the tokens of ids [C] that are neither blank nor filler.
    length_of: the length that rewards are given, a value of --length_of.
    limit: of each call of a reward.

    Raises RewardFailed for a reward that is no finite number.
    """
    trained = reward_functions[trained_reward]
    samples = []
    for group, (example, of_prompt) in enumerate(zip(examples, completions, strict=True)):
        for number, completion in enumerate(of_prompt, 1):
            text = decode(completion.ids)
            answer = parse_answer(text, answer_format, example.label_set)
            lengths = {
                "text": text_length(completion.ids),
                "completion": len(completion.ids),
            }
            which = Completed(example.id, text, number, len(of_prompt))
            rewards = all_rewards(
                reward_functions, answer, example.target, lengths[length_of], which, limit
            )
            in_loss = not (completion.truncated and mask_truncated_completions)
            sample = Sample(
                group=group,
                example=example,
                text=text,
                answer=answer,
                ids=completion.ids,
                mask=torch.full((len(completion.ids),), in_loss),
                truncated=completion.truncated,
                text_length=lengths["text"],
                sampling_logprobs=completion.logprobs,
                top_p_mass=completion.top_p_mass,
                rewards=rewards,
                reward=trained_number(
                    trained_reward, trained, rewards[trained_reward], which, limit
                ),
            )
            samples.append(sample)
    return samples


# ---- micro-batches -------------------------------------------------------------------------------
@dataclass(frozen=True)
class MicroBatch:
    """Hold N samples padded to T completion tokens, as `grpo_loss` takes them.

    batch: the tokens, for the forward pass.
    advantages [N] fp32: A_i of each sample.
    sampling_logprobs, old_logprobs, ref_logprobs [N,T] fp32: 0 beyond the end.
    """

    batch: Batch
    advantages: Tensor
    sampling_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    @property
    def mask(self) -> Tensor:
        """Return the mask [N,T] bool, true on the tokens in the loss."""
        return self.batch.completion_mask


def collate_samples(
    samples: Sequence[Sample],
    prompts: Sequence[EncodedPrompt],
    pad_token_id: int,
    device: torch.device,
) -> MicroBatch:
    """Pad samples into one micro-batch on `device`.

    prompts: those of the whole rollout. A sample's `group` is the index of its prompt there.
    """
    rows = [sample.row(prompts) for sample in samples]
    batch = collate_rows(rows, pad_token_id).to(device)
    width = batch.completion_mask.shape[1]

    def padded(values: Sequence[Tensor]) -> Tensor:
        rows = torch.zeros(len(values), width)
        for row, own in zip(rows, values, strict=True):
            row[: len(own)] = own
        return on_device(rows, device)  # [N,T]

    advantages = torch.tensor([sample.advantage for sample in samples])
    return MicroBatch(
        batch,
        on_device(advantages, device),
        padded([sample.sampling_logprobs for sample in samples]),
        padded([sample.old_logprobs for sample in samples]),
        padded([sample.ref_logprobs for sample in samples]),
    )


def of_hospital(example: Example) -> dict[str, str]:
    """Name the hospital of an example for a record, in which one without a name has no place."""
    return {} if example.hospital is None else {"hospital": example.hospital}


# ---- in a checkpoint, and to other ranks ---------------------------------------------------------
def pack_samples(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Turn a rollout into (tensors, record), for a checkpoint or for other ranks.

    tensors: each field of PER_TOKEN that is known by now, all completions one after the other.
    record: the rest as JSON. Python writes numbers that it reads back bit for bit.

    Text and answer follow from the ids, and are not packed.
    """
    record = [
        {
            "group": sample.group,
            "example": sample.example.id,
            **of_hospital(sample.example),
            "length": len(sample.ids),
            "truncated": sample.truncated,
            "text_length": sample.text_length,
            "rewards": {
                name: {"total": reward.total, "parts": reward.parts}
                for name, reward in sample.rewards.items()
            },
            "reward": sample.reward,
            "advantage": sample.advantage,
        }
        for sample in samples
    ]
    if not samples:
        return {}, record
    tensors = {name: torch.cat([getattr(sample, name) for sample in samples]) for name in PER_TOKEN}
    known = len(tensors["ids"])
    return {name: tensor for name, tensor in tensors.items() if len(tensor) == known}, record


def unpack_samples(
    tensors: dict[str, Tensor],
    record: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    decode: Callable[[Tensor], str],
    answer_format: str,
) -> list[Sample]:
    """Make the samples again that `pack_samples` packed.

    examples: the training data, in which each sample's example is found by its hospital and id.
    """
    by_id = {(example.hospital, example.id): example for example in examples}
    lengths = [row["length"] for row in record]
    pieces = {name: tensor.split(lengths) for name, tensor in tensors.items()}
    samples = []
    for i, row in enumerate(record):
        text = decode(pieces["ids"][i])
        rewards = {
            name: Reward(total=reward["total"], parts=reward["parts"])
            for name, reward in row["rewards"].items()
        }
        example = by_id[row.get("hospital"), row["example"]]
        sample = Sample(
            group=row["group"],
            example=example,
            text=text,
            answer=parse_answer(text, answer_format, example.label_set),
            truncated=row["truncated"],
            text_length=row["text_length"],
            rewards=rewards,
            reward=row["reward"],
            advantage=row["advantage"],
            **{name: piece[i] for name, piece in pieces.items()},
        )
        samples.append(sample)
    return samples
