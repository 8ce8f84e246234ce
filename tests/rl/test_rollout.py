"""Protect the path from completions to micro-batches and back.

Checked: rewards and masks of samples, advantages by group, padding, old and reference log-
probabilities, the metrics of a rollout by hand, and a rollout that survives a checkpoint bit for
bit.

Run: pytest tests/rl/test_rollout.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import engine.policy
import rl.rollout
from data.examples import Example, read_jsonl
from data.files import DataError
from data.labels import LABELS
from engine.completion import Completion
from engine.encode import EncodedPrompt
from engine.forward import completion_logprobs
from engine.model import add_reference, attach_adapter, load_model
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from engine.ranks import Ranks
from engine.runtime import StepFailed, StopRequested
from rl.logs import completion_rows, mismatch_metrics, rollout_metrics
from rl.objective import ObjectiveConfig
from rl.rewards import HardReward, NuancedReward, Reward
from rl.rollout import Rollouts
from rl.samples import Sample, build_samples, collate_samples, pack_samples, unpack_samples
from rl.settings import GRPOConfig
from tests.helpers.rollouts import ANSWERS, advantages_of, example, prompt_of, rollouts_of, sample
from tests.helpers.tiny import policy_of

CPU = torch.device("cpu")


def decode(ids: torch.Tensor) -> str:
    return ANSWERS[int(ids[0])]


def completion(first: int, length: int = 3, truncated: bool = False) -> Completion:
    return Completion(
        torch.tensor([first] + [9] * (length - 1)),
        torch.full((length,), -0.5),
        torch.full((length,), 0.75),
        truncated,
    )


# ---- rewards, masks, advantages ------------------------------------------------------------------
def built(rewards, trained: str, masked: bool = False) -> list[Sample]:
    groups = [
        [completion(1, 3), completion(2, 5, truncated=True)],
        [completion(3, 2), completion(4, 4)],
    ]
    return build_samples(
        [example("e1"), example("e2")],
        groups,
        decode,
        rewards,
        trained,
        answer_format="think_solution",
        mask_truncated_completions=masked,
        text_length=len,
        length_of="completion",
    )


def test_samples_carry_every_reward_of_their_own_completion():
    samples = built(
        {"hard": HardReward(length_penalty=0.1, min_length=4), "nuanced": NuancedReward({})}, "hard"
    )
    assert [(s.group, s.example.id, s.text) for s in samples] == [
        (0, "e1", ANSWERS[1]),
        (0, "e1", ANSWERS[2]),
        (1, "e2", ANSWERS[3]),
        (1, "e2", ANSWERS[4]),
    ]
    # Exact but 3 tokens, below 4: 1 - 0.1. One of two labels, 5 tokens: 1/2. Unreadable: 0. Without
    # <think> not valid: 0.
    assert [s.reward for s in samples] == [0.9, 0.5, 0.0, 0.0]
    # 100 + 30 + 20; 30 + 20/2 less 10 for the wrong label; unreadable; 150 less 25 for the form
    assert [s.rewards["nuanced"].total for s in samples] == [150.0, 30.0, -200.0, 125.0]


@pytest.mark.parametrize(
    ("length_of", "hard"), [("text", [0.9, 0.4, 0.0, 0.0]), ("completion", [1.0, 0.5, 0.0, 0.0])]
)
def test_eq_3_counts_the_tokens_that_its_setting_names(length_of, hard):
    # 3 and 5 tokens for at least 3; of each the last is blank, so 2 and 4 for at least 5. The other
    # two are not valid.
    least = 5 if length_of == "text" else 3
    samples = build_samples(
        [example("e1"), example("e2")],
        [[completion(1, 3), completion(2, 5)], [completion(3, 2), completion(4, 4)]],
        decode,
        {"hard": HardReward(length_penalty=0.1, min_length=least)},
        "hard",
        answer_format="think_solution",
        mask_truncated_completions=False,
        text_length=lambda ids: len(ids) - 1,
        length_of=length_of,
    )
    assert [s.reward for s in samples] == pytest.approx(hard)
    assert [s.text_length for s in samples] == [2, 4, 1, 3]


def test_the_trained_reward_is_scaled_and_floored():
    nuanced = NuancedReward({}, unparsed_penalty=400.0)
    samples = built({"hard": HardReward(), "nuanced": nuanced}, "nuanced")
    # 0.01 times the points; -400 is raised to the floor of -300 first
    assert [s.reward for s in samples] == pytest.approx([1.5, 0.3, -3.0, 1.25])
    assert samples[2].rewards["nuanced"].total == -400.0


def test_building_samples_leaves_the_windows_alone():
    nuanced = NuancedReward({}, window=2, min_window=1)
    before = nuanced.state_dict()
    built({"nuanced": nuanced}, "nuanced")
    assert nuanced.state_dict() == before == {"images": []}


def test_truncated_completions_are_masked_as_a_whole_only_where_asked():
    rewards = {"hard": HardReward()}
    assert [s.mask.tolist() for s in built(rewards, "hard")] == [
        [True] * 3,
        [True] * 5,
        [True] * 2,
        [True] * 4,
    ]
    assert [s.mask.tolist() for s in built(rewards, "hard", masked=True)] == [
        [True] * 3,
        [False] * 5,
        [True] * 2,
        [True] * 4,
    ]


def test_every_prompt_needs_its_completions():
    with pytest.raises(ValueError):
        build_samples(
            [example()],
            [[completion(1)], [completion(1)]],
            decode,
            {"hard": HardReward()},
            "hard",
            answer_format="think_solution",
            mask_truncated_completions=False,
            text_length=len,
            length_of="completion",
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_advantage_that_is_not_finite_is_not_kept(value):
    """As a fork's `group_advantages` might make one: the next update would fail on it."""
    rollouts = rollouts_of([sample(0, 1.0), sample(1, 0.25)])
    match = rf"example 'e1': advantage of a completion is {value}; what computes it"
    with pytest.raises(StepFailed, match=match):
        rollouts.set_advantages(torch.tensor([0.5, value]))


def test_advantages_are_centred_within_each_prompt():
    samples = [
        sample(0, 1.0),
        sample(0, 0.0),
        sample(1, 0.1),
        sample(1, 0.1),
        sample(1, 0.1),
        sample(0, 0.5),
    ]
    # Prompt 0: mean 0.5 over its three, wherever they lie. Prompt 1: equal, so exactly 0 although
    # 0.1 is not exact.
    advantages = advantages_of(samples, ObjectiveConfig())
    assert advantages.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert [s.advantage for s in samples] == [0.0] * 6  # to compute them changes no sample
    rollouts_of(samples).set_advantages(advantages)
    assert [s.advantage for s in samples] == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    # Standard deviation of 1, 0, 0.5 with ddof 1 is 0.5: 0.5 / (0.5 + 1e-4)
    scaled = advantages_of(samples, ObjectiveConfig(scale_rewards="group"))
    assert scaled[0] == pytest.approx(0.5 / 0.5001, abs=1e-12)


def test_every_sample_needs_its_advantage():
    with pytest.raises(ValueError):
        rollouts_of([sample(0, 1.0), sample(0, 0.0)]).set_advantages(torch.zeros(1))


def test_what_forks_are_given_of_the_advantages():
    """Protects the KL of each completion, over the tokens in the loss."""
    samples = [
        sample(
            0,
            1.0,
            sampling_logprobs=torch.tensor([-1.0, -3.0]),
            ref_logprobs=torch.tensor([-1.5, -2.75]),
        ),
        sample(
            0,
            0.0,
            mask=torch.tensor([False, True]),
            ref_logprobs=torch.tensor([float("nan"), -1.25]),
        ),
        sample(3, 0.1, mask=torch.zeros(2, dtype=torch.bool)),
    ]
    rollouts = rollouts_of(samples)
    # (-1 + 1.5) + (-3 + 2.75) = 0.5 - 0.25; the second token alone, -1 + 1.25; nothing
    assert rollouts.kl.tolist() == [0.25, 0.25, 0.0] and rollouts.kl.dtype == torch.float64
    assert rollouts.groups.tolist() == [0, 0, 3]
    # 0.1 as it is, so that equal rewards stay equal
    assert rollouts.rewards.tolist() == [1.0, 0.0, 0.1] and rollouts.rewards.dtype == torch.float64


def test_old_log_probabilities_of_every_micro_batch_or_none():
    rollouts = rollouts_of([sample(0, 0.0), sample(0, 0.0)])
    with pytest.raises(ValueError, match="shorter"):
        rollouts.keep_old([[0], [1]], [torch.zeros(1, 2)])


# ---- micro-batches -------------------------------------------------------------------------------
def test_micro_batches_are_planned_in_order():
    prompts = [prompt_of(10), prompt_of(10)]
    samples = [sample(i // 4, 0.0, length=i + 1) for i in range(8)]

    def plan(size: int, accumulation: int, max_tokens: int | None) -> list[list[list[int]]]:
        rollouts = rollouts_of(
            samples,
            prompts,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=8 // size,
            num_iterations=2,
            max_tokens_per_forward=max_tokens,
        )
        of_pass = rollouts.plan.updates // 2
        found = [rollouts.micro_batches(update) for update in range(2 * of_pass)]
        # the second iteration over the rollout learns from the same micro-batches
        assert found[of_pass:] == found[:of_pass]
        return found[:of_pass]

    assert plan(size=4, accumulation=1, max_tokens=None) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert plan(size=2, accumulation=2, max_tokens=None) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    # 10 + 1 + 2 + 3 = 16 fit, 4 more do not: 10 + 4; then 10 + 5, 10 + 6, ... each alone
    assert plan(size=4, accumulation=1, max_tokens=17) == [[[0, 1, 2], [3]], [[4], [5], [6], [7]]]


def test_totals_are_of_the_whole_step():
    masked = torch.tensor([True, False, True])
    samples = [sample(0, 0.0, length=3, mask=masked), sample(0, 0.0, length=5), sample(1, 0.0)]
    rollouts = rollouts_of(
        samples,
        max_completion_length=7,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    assert rollouts.totals(0) == {
        "num_completions": 3,
        "num_tokens": 2 + 2 + 5,
        "max_completion_length": 7,
    }


def test_samples_are_padded_on_the_right_with_their_own_prompt():
    prompts = [
        EncodedPrompt(torch.tensor([20 + p] * (p + 1)), torch.zeros(p + 1, dtype=torch.long), {})
        for p in range(2)
    ]
    masked = torch.zeros(1, dtype=torch.bool)
    samples = [
        sample(
            1,
            0.0,
            length=3,
            advantage=0.25,
            old_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
            ref_logprobs=torch.tensor([-4.0, -5.0, -6.0]),
        ),
        sample(
            0,
            0.0,
            length=1,
            advantage=-0.5,
            mask=masked,
            old_logprobs=torch.tensor([-7.0]),
            ref_logprobs=torch.zeros(0),
            sampling_logprobs=torch.tensor([-8.0]),
        ),
    ]
    micro = collate_samples(samples, prompts, 0, CPU)
    assert micro.batch.prompts.input_ids.tolist() == [
        [21, 21],
        [0, 20],
    ] and micro.batch.prompt_of_row.tolist() == [0, 1]
    assert micro.batch.completion_ids.tolist() == [[1, 2, 3], [1, 0, 0]]
    assert micro.mask.tolist() == [[True, True, True], [False, False, False]]
    assert micro.advantages.tolist() == [0.25, -0.5] and micro.advantages.dtype == torch.float32
    assert micro.old_logprobs.tolist() == [[-1.0, -2.0, -3.0], [-7.0, 0.0, 0.0]]
    # a pass that was not made
    assert micro.ref_logprobs.tolist() == [[-4.0, -5.0, -6.0], [0.0, 0.0, 0.0]]
    assert micro.sampling_logprobs.tolist() == [[-1.0, -1.0, -1.0], [-8.0, 0.0, 0.0]]


def test_what_a_pass_has_not_made_yet_is_empty():
    made = built({"hard": HardReward()}, "hard")[0]
    assert made.advantage == 0.0
    assert made.ref_logprobs.tolist() == made.old_logprobs.tolist() == []


def test_a_micro_batch_lies_on_the_device_that_is_asked_for():
    micro = collate_samples([sample(0, 0.0)], [prompt_of(2)], 0, torch.device("meta"))
    found = [micro.batch.completion_ids, micro.mask, micro.advantages]
    found += [micro.sampling_logprobs, micro.old_logprobs, micro.ref_logprobs]
    assert [tensor.device.type for tensor in found] == ["meta"] * 6


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def rollout(request, tiny_checkpoint, tiny_sft_run, tiny_data) -> tuple[Policy, Rollouts]:
    """Make (policy, rollouts): six completions of two prompts.

    `default` is the base, `reference` is SFT. Tests take a copy of the samples, by `fresh`.
    """
    model = load_model(
        str(tiny_checkpoint(request.param)),
        dtype=torch.float32,
        device=CPU,
        min_visual_tokens=4,
        max_visual_tokens=4,
    )
    net: PeftModel = attach_adapter(model, tiny_sft_run(request.param), trainable=True)
    add_reference(net, tiny_sft_run(request.param))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B.default" in name:
                parameter.zero_()
    policy = policy_of(net, model, temperature=0.8)
    config = GRPOConfig(
        prompt="short",
        temperature=0.8,
        top_p=0.95,
        max_completion_length=5,
        num_generations=3,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        seed=0,
    )
    rollouts = Rollouts(read_jsonl(tiny_data)[:2], {"hard": HardReward()}, config)
    rollouts.take(0, policy)
    rollouts.reward(rollouts.sample(policy, lambda: False), policy)
    return policy, rollouts


def fresh(rollouts: Rollouts, **settings: object) -> Rollouts:
    """Copy a rollout, with its samples as they are before any pass and with other settings."""
    other = Rollouts(
        rollouts.data,
        rollouts.reward_functions,
        dataclasses.replace(rollouts.config, **settings),  # type: ignore[arg-type]  # of any field
    )
    other.examples, other.prompts = rollouts.examples, rollouts.prompts
    other.samples = [dataclasses.replace(one) for one in rollouts.samples]
    return other


def score_all(rollouts: Rollouts, policy: Policy) -> None:
    """Score a rollout, then compute what is left to the first update: its old log-probabilities."""
    rollouts.score(policy, with_reference=True)
    micro_batches = rollouts.micro_batches(0)
    with torch.no_grad(), policy.evaluating():
        batches = [rollouts.micro_batch(rows, policy).batch for rows in micro_batches]
        rollouts.keep_old(micro_batches, [policy.logprobs(batch) for batch in batches])


@pytest.mark.parametrize(("whose", "call"), [("old", 4), ("ref", 2)])
def test_a_log_probability_that_is_not_finite_stops_the_scoring(rollout, monkeypatch, whose, call):
    policy, rollouts = rollout
    # updates of two completions: the passes are reference 0, 1, 2, old 1, 2
    twos = fresh(rollouts, per_device_train_batch_size=2, steps_per_generation=3)
    logprobs, calls = type(policy).logprobs, []

    def poisoned(self, batch):
        values = logprobs(self, batch)
        calls.append(1)
        if len(calls) == call:
            values[1, 0] = float("nan")
        return values

    monkeypatch.setattr(type(policy), "logprobs", poisoned)
    broken = twos.samples[3].example.id
    twos.score(policy, with_reference=True)
    twos.samples[0].old_logprobs = twos.samples[1].old_logprobs = torch.zeros(1)  # by the update
    match = f"example '{broken}': {whose}_logprobs of a completion is not finite; what computes it"
    with pytest.raises(StepFailed, match=match):
        twos.set_advantages(torch.zeros(len(twos.samples)))


def test_old_and_reference_log_probabilities_are_of_the_right_adapter(rollout):
    policy, rollouts = rollout
    net, samples = policy.net, rollouts.samples
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    net.train()
    # updates of one completion, and of two: the pass makes all old ones but the first's
    alone = fresh(rollouts, per_device_train_batch_size=1, steps_per_generation=6)
    twos = fresh(rollouts, per_device_train_batch_size=2, steps_per_generation=3)
    alone.score(policy, with_reference=True)
    score_all(twos, policy)
    assert net.training and net.active_adapter == "default"
    assert flags == {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    net.eval()
    by_hand = reference_by_hand(policy, samples, rollouts.prompts)
    assert len(alone.samples[0].old_logprobs) == 0  # left to the first update
    alone.samples[0].old_logprobs = twos.samples[0].old_logprobs
    for scored in (alone.samples, twos.samples):
        for before, after, reference in zip(samples, scored, by_hand, strict=True):
            assert (
                torch.equal(before.ids, after.ids)
                and after.old_logprobs.dtype == after.ref_logprobs.dtype == torch.float32
            )
            assert not after.old_logprobs.requires_grad and not after.ref_logprobs.requires_grad
            torch.testing.assert_close(
                after.old_logprobs, before.sampling_logprobs, atol=1e-5, rtol=0
            )  # what the sampler drew from
            batch = collate_samples([before], rollouts.prompts, pad_id(policy), CPU).batch
            with torch.no_grad(), net.disable_adapter():  # `default` has B = 0: it is the base
                of_base, _ = completion_logprobs(
                    net,
                    policy.family,
                    batch,
                    temperature=0.8,
                    suppress_token_ids=policy.base.suppressed_ids,
                )
            torch.testing.assert_close(after.old_logprobs, of_base[0], atol=1e-5, rtol=0)
            assert (after.ref_logprobs - after.old_logprobs).abs().max() > 1e-3
            torch.testing.assert_close(after.ref_logprobs, reference, atol=1e-5, rtol=0)


def test_sampling_stops_where_it_is_told_to(rollout):
    policy, rollouts = rollout
    with pytest.raises(StopRequested):
        fresh(rollouts).sample(policy, lambda: True)


def pad_id(policy: Policy) -> int:
    return policy.encoder.pad_token_id


def reference_by_hand(
    policy: Policy, samples: Sequence[Sample], prompts: Sequence[EncodedPrompt]
) -> list[torch.Tensor]:
    """Compute log-probabilities under the SFT adapter.

    Its B matrices are copied into `default` for a moment.
    """
    parameters = dict(policy.net.named_parameters())
    trained = {name: one for name, one in parameters.items() if "lora_B.default" in name}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parameters[name.replace(".default.", ".reference.")])
        found = []
        for item in samples:
            batch = collate_samples([item], prompts, pad_id(policy), CPU).batch
            found.append(
                completion_logprobs(
                    policy.net,
                    policy.family,
                    batch,
                    temperature=0.8,
                    suppress_token_ids=policy.base.suppressed_ids,
                )[0][0]
            )
        for parameter in trained.values():
            parameter.zero_()
    return found


def test_without_a_reference_pass_the_reference_is_the_policy(rollout):
    policy, rollouts = rollout
    scored = fresh(
        rollouts,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
    )
    scored.score(policy, with_reference=False)
    assert all(torch.equal(s.ref_logprobs, s.sampling_logprobs) for s in scored.samples)


def test_the_first_steps_old_log_probabilities_are_left_to_it(rollout, monkeypatch):
    """They are its own, to the last bit: those that a pass before the step would have found."""
    policy, rollouts = rollout
    passes, forward = [], engine.policy.completion_logprobs
    monkeypatch.setattr(
        engine.policy,
        "completion_logprobs",
        lambda *given, **more: passes.append(policy.net.active_adapter) or forward(*given, **more),
    )
    # two steps of three completions; the longest prompt with two completions fills a micro-batch
    limit = max(len(prompt.input_ids) for prompt in rollouts.prompts) + 2 * 5
    settings = {
        "per_device_train_batch_size": 3,
        "steps_per_generation": 2,
        "max_tokens_per_forward": limit,
    }
    left, whole = fresh(rollouts, **settings), fresh(rollouts, **settings)
    assert left.micro_batches(0) == [[0, 1], [2]] and left.micro_batches(1) == [[3, 4], [5]]
    left.score(policy, with_reference=True)
    assert passes == ["reference"] * 4 + ["default"] * 2
    assert [len(one.old_logprobs) == 0 for one in left.samples] == [True] * 3 + [False] * 3
    score_all(whole, policy)
    policy.net.train()
    of_step = [
        policy.logprobs_and_entropy(left.micro_batch(rows, policy).batch)[0]
        for rows in left.micro_batches(0)
    ]
    assert all(logprobs.requires_grad for logprobs in of_step)
    left.keep_old(left.micro_batches(0), of_step)
    for kept, made in zip(left.samples, whole.samples, strict=True):
        assert not kept.old_logprobs.requires_grad
        assert torch.equal(kept.old_logprobs, made.old_logprobs)
        assert torch.equal(kept.ref_logprobs, made.ref_logprobs)


def test_where_memory_runs_out_the_reference_is_scored_again_in_the_same_micro_batches(
    rollout, monkeypatch
):
    """The KL before the first update is exactly 0 only where both ran in the same ones."""
    policy, rollouts = rollout
    passes, forward = [], engine.policy.completion_logprobs

    def runs_out_once(net, family, batch, **more):
        passes.append((net.active_adapter, len(batch.completion_ids)))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(net, family, batch, **more)

    monkeypatch.setattr(engine.policy, "completion_logprobs", runs_out_once)
    scored = fresh(rollouts, per_device_train_batch_size=3, steps_per_generation=2)
    scored.score(policy, with_reference=True)
    assert passes[:3] == [("reference", 3), ("reference", 3), ("default", 3)]
    sizes = [len(rows) for rows in scored.micro_batches(0) + scored.micro_batches(1)]
    of_second = sizes[len(scored.micro_batches(0)) :]
    assert max(sizes) < 3
    old = [("default", size) for size in of_second]
    assert passes[3:] == [*old, *(("reference", size) for size in sizes), *old]


# ---- metrics by hand -----------------------------------------------------------------------------
def test_metrics_of_a_rollout_by_hand():
    def scored(group, reward, length, text, **fields):
        sampled = torch.full((length,), -1.0)
        old = sampled.clone()
        old[0] += fields.pop("shift", 0.0)
        return sample(
            group,
            reward,
            length,
            text,
            old_logprobs=old,
            ref_logprobs=old,
            sampling_logprobs=sampled,
            **fields,
        )

    samples = [
        scored(0, 1.0, 2, 1, top_p_mass=torch.tensor([0.5, 1.0])),
        scored(0, 0.0, 4, 3, truncated=True),
        scored(1, 0.5, 3, 2, shift=0.5),
        scored(1, 0.5, 3, 2),
    ]
    metrics = rollout_metrics(samples) | mismatch_metrics(samples)
    expected = {
        "reward": 0.5,  # (1 + 0 + 0.5 + 0.5) / 4
        "reward_std": (0.5 / 3) ** 0.5,  # squares 0.25 + 0.25 + 0 + 0, ddof 1
        "reward_group_std": 0.5**0.5 / 2,  # of 1 and 0: sqrt(0.5); of 0.5 twice: 0
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": 3.0,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.25,
        "completions/mean_terminated_length": 8 / 3,
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 3.0,
        "completions/valid_rate": 0.75,
        "completions/parsed_rate": 0.75,
        "completions/distinct_per_group": 1.5,  # two texts, then one
        "completions/mean_labels": 1.25,  # 1, 0, 2, 2
        "sampling/top_p_mass_mean": 11.5 / 12,  # 0.5 once, else 1, of 12 tokens
        "rewards/hard/mean": 0.5,
        "rewards/hard/std": (0.5 / 3) ** 0.5,
        "rewards/hard/jaccard": 0.5,
        "rewards/hard/length": 0.0,
        "sampling/sampling_logp_difference/mean": 0.5 / 12,
        "sampling/sampling_logp_difference/max": 0.5,
        # exp(0.5)
        "sampling/ratio/min": 1.0,
        "sampling/ratio/max": 1.6487213,
        "sampling/ratio/mean": (11 + 1.6487213) / 12,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_metrics_where_every_completion_is_truncated_and_masked():
    masked = torch.zeros(2, dtype=torch.bool)
    samples = [
        sample(0, 0.0, truncated=True, mask=masked),
        sample(0, 0.0, truncated=True, mask=masked),
    ]
    metrics = rollout_metrics(samples) | mismatch_metrics(samples)
    assert metrics["completions/clipped_ratio"] == 1.0 and metrics["frac_reward_zero_std"] == 1.0
    assert not [name for name in metrics if "terminated" in name or "sampling_logp" in name]


def test_rows_of_the_completions_file():
    (row,) = completion_rows(
        [sample(3, 0.5, text=2, advantage=-0.25)], "reasoning_a", "think_solution"
    )
    assert list(row.items()) == [
        # a row of a predictions file
        ("id", "e3"),
        ("patient_id", "p1"),
        ("dataset", "site"),
        ("labels", ["Edema"]),
        ("evaluated_labels", list(LABELS)),
        ("source_labels", []),
        ("prompt", "reasoning_a"),
        ("completion", ANSWERS[2]),
        ("completion_length", 2),
        ("predicted", ["Edema", "Pneumonia"]),
        ("valid", True),
        ("parsed", True),
        ("problem", None),
        ("unknown", []),
        ("answer_format", "think_solution"),
        # what a rollout adds
        ("group", 3),
        ("image", "image.png"),
        ("truncated", False),
        ("text_length", 2),
        ("rewards", {"hard": {"total": 0.5, "jaccard": 0.5, "length": 0.0}}),
        ("reward", 0.5),
        ("advantage", -0.25),
    ]


# ---- checkpoint ----------------------------------------------------------------------------------
def test_a_rollout_survives_a_checkpoint_bit_for_bit(rollout):
    policy, rollouts = rollout
    scored = fresh(rollouts)
    for i, one in enumerate(scored.samples):
        one.reward = 0.1 * i
        one.rewards = {"hard": Reward(0.1 * i, {"jaccard": 0.1 * i, "length": -0.0})}
    score_all(scored, policy)
    samples = scored.samples
    scored.set_advantages(advantages_of(samples, ObjectiveConfig(scale_rewards="group")))
    assert samples[0].advantage < 0 < samples[2].advantage
    samples[1].mask = torch.zeros_like(samples[1].mask)
    samples[1].truncated = not samples[1].truncated
    tensors, record = pack_samples(samples)
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    examples = list({s.example.id: s.example for s in samples}.values())
    decoded = policy.encoder.decode
    found = unpack_samples(
        tensors, json.loads(json.dumps(record)), examples, decoded, "think_solution"
    )
    assert len(found) == len(samples) == 6
    for before, after in zip(samples, found, strict=True):
        for name, value in vars(before).items():
            restored = getattr(after, name)
            if isinstance(value, torch.Tensor):
                assert restored.dtype == value.dtype and torch.equal(restored, value), name
            else:
                assert restored == value, name


def test_an_empty_rollout_is_packed_as_nothing():
    tensors, record = pack_samples([])
    assert (tensors, record) == ({}, [])
    assert unpack_samples(tensors, record, [], decode, "think_solution") == []


# ---- the stream of prompts -----------------------------------------------------------------------
class Encoding:
    """Stand in for a policy: note each example that is encoded, and each that is expected."""

    def __init__(self, damaged: str | None = None) -> None:
        self.asked: list[str] = []
        self.expected: list[list[str]] = []
        self.damaged = damaged

    def expect(self, examples: Iterable[Example]) -> None:
        self.expected.append([one.id for one in examples])

    def encode(self, example: Example) -> EncodedPrompt:
        if example.id == self.damaged:
            raise DataError("a damaged image")
        self.asked.append(example.id)
        number = torch.tensor([int(example.id[1:])])
        return EncodedPrompt(number, torch.zeros(1, dtype=torch.long), {})


def stream() -> Rollouts:
    """Make five examples in rollouts of two prompts and four steps.

    They are two steps in each of two passes.
    """
    config = GRPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_generations=2,
        num_iterations=2,
        seed=7,
    )
    return Rollouts([example(f"e{i}") for i in range(5)], {"hard": HardReward()}, config)


def test_steps_of_a_rollout():
    rollouts = stream()
    assert [rollouts.update_of(step) for step in range(6)] == [0, 1, 2, 3, 0, 1]
    # 2 of 5 prompts a rollout, a quarter of them with each of its four steps
    assert [rollouts.epoch_after(steps) for steps in (1, 2, 4, 5, 10)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.5, 1.0], abs=1e-12
    )


def test_prompts_are_a_stream_of_shuffled_epochs():
    rollouts, policy = stream(), Encoding()
    taken = []
    for step in range(0, 20, 4):
        rollouts.take(step, policy)
        ids = [one.id for one in rollouts.examples]
        assert [f"e{int(prompt.input_ids)}" for prompt in rollouts.prompts] == ids
        taken += ids
    assert sorted(taken[:5]) == sorted(taken[5:]) == [f"e{i}" for i in range(5)]
    # each epoch in an order of its own; written down once
    assert taken == [f"e{i}" for i in (3, 0, 1, 4, 2, 4, 2, 1, 3, 0)]
    again, other = stream(), Encoding()
    again.take(8, other)  # a rollout across the border of two epochs, taken without those before
    assert [one.id for one in again.examples] == taken[4:6]


def test_images_of_the_next_rollout_are_expected_while_this_one_samples():
    rollouts, policy = stream(), Encoding()
    total = rollouts.plan.total_steps(5)
    assert total == 12  # an epoch of 5 prompts, in rollouts of 2 prompts and 4 steps
    rollouts.take(4, policy)
    # the order is that of the test above. Its own are expected too: a run may begin with it
    assert policy.expected == [["e1", "e4"], ["e2", "e4"]] and policy.asked == ["e1", "e4"]
    policy.expected.clear()
    rollouts.take(8, policy)
    assert policy.expected == [policy.asked[2:]]  # after the last rollout nothing is expected


def test_each_rank_expects_its_own_share():
    expected = []
    for rank in (0, 1):
        ranks = Ranks()
        ranks.rank, ranks.size, ranks.first = rank, 2, rank == 0
        ranks.together = nullcontext  # type: ignore[method-assign]  # there is no other one
        config = replace(stream().config, per_device_train_batch_size=2)
        rollouts = Rollouts(stream().data, {"hard": HardReward()}, config, ranks)
        rollouts._all_prompts = lambda own: list(own)  # type: ignore[method-assign]
        policy = Encoding()
        rollouts.take(0, policy)
        assert policy.expected[0] == policy.asked
        expected.append(policy.expected)
    # four prompts a rollout, each with one step of one rank: whole groups of every step
    assert [sorted(a + b) for a, b in zip(*expected, strict=True)] == [
        sorted(f"e{i}" for i in rollout) for rollout in ((3, 0, 1, 4), (2, 4, 2, 1))
    ]
    assert all(len(own) == 2 for of_rank in expected for own in of_rank)


def test_prompts_of_several_hospitals_come_by_weight_in_whole_groups():
    """12 positions an epoch, of 2 : 1 weights 8 and 4, whatever the hospitals' sizes."""
    examples = [replace(example(f"e{i}"), hospital="a" if i < 9 else "b") for i in range(12)]
    config = GRPOConfig(
        train_file=("a=x@1", "b=y@2"),
        per_device_train_batch_size=4,
        num_generations=2,
        steps_per_generation=1,
    )
    rollouts, policy = Rollouts(examples, {"hard": HardReward()}, config), Encoding()
    taken = []
    for step in range(18):  # three epochs of six rollouts of two prompts
        rollouts.take(step, policy)
        taken += [one.hospital for one in rollouts.examples]
    assert [taken[start : start + 12].count("b") for start in (0, 12, 24)] == [8, 8, 8]
    resumed = Rollouts(examples, {"hard": HardReward()}, config)
    resumed.take(17, policy)
    assert resumed.examples == rollouts.examples
    first, second = rollouts.examples
    rollouts.samples = [sample(0, 1.0, example=first)] * 2 + [sample(1, 0.0, example=second)] * 2
    numbers = {"a": 0, "b": 1}
    expected = [numbers[one.hospital] for one in (first, first, second, second)]
    assert rollouts.hospitals.tolist() == expected


def test_one_id_in_two_hospitals_is_two_examples_in_a_checkpoint():
    examples = [
        replace(example("e1", label), hospital=hospital)
        for label, hospital in (("Edema", "a"), ("Fracture", "b"))
    ]
    samples = [sample(group, 1.0, example=one) for group, one in enumerate(examples)]
    tensors, record = pack_samples(samples)
    assert [row["hospital"] for row in record] == ["a", "b"]
    found = unpack_samples(tensors, record, examples, decode, "think_solution")
    assert [one.example for one in found] == examples
    # where there is one hospital alone a record is that of before
    assert "hospital" not in pack_samples([sample(0, 1.0)])[1][0]


@pytest.mark.parametrize("step", [0, 4, 8, 40])
def test_completions_have_the_numbers_of_their_prompts_positions(monkeypatch, step):
    """2 prompts a rollout of 4 steps. No rollout before it is needed, and none moves it."""
    given = []
    monkeypatch.setattr(rl.rollout, "generate", lambda *_, uniform, **__: given.append(uniform))
    rollouts = stream()
    rollouts.take(step, Encoding())
    for _ in range(2):  # as after a cut by memory
        rollouts.sample(None, lambda: False)  # type: ignore[arg-type]  # nothing asks it
    shape = 2, rollouts.config.max_completion_length
    expected = [uniform_numbers("rollout", 7, step // 2 + i, *shape) for i in range(2)]
    for uniform in given:
        assert all(torch.equal(one, other) for one, other in zip(uniform, expected, strict=True))
    assert len(given) == 2


def test_nothing_is_done_in_the_middle_of_a_rollout():
    """The prompts at hand stay: no image is looked at and no prompt encoded a second time."""
    rollouts, policy = stream(), Encoding()
    rollouts.take(0, policy)
    at_hand = rollouts.examples, rollouts.prompts, list(policy.asked)
    for step in (1, 2, 3):
        rollouts.take(step, None)  # type: ignore[arg-type]  # whoever asked it would fail
        assert rollouts.examples is at_hand[0] and rollouts.prompts is at_hand[1]
    assert policy.asked == at_hand[2] and len(policy.asked) == 2
    rollouts.take(4, policy)
    assert len(policy.asked) == 4 and rollouts.prompts is not at_hand[1]


def test_a_resumed_run_takes_the_prompts_of_the_rollout_it_is_in():
    whole, resumed, policy = stream(), stream(), Encoding()
    whole.take(4, policy)
    resumed.take(6, policy)  # the third step of the second rollout
    assert [one.id for one in resumed.examples] == [one.id for one in whole.examples]
    assert len(policy.asked) == 4


def test_what_later_steps_still_learn_from():
    rollouts = stream()
    rollouts.samples = [sample(0, 1.0)]
    assert [len(rollouts.unfinished(step)) for step in range(5)] == [0, 1, 1, 1, 0]
    assert rollouts.unfinished(1) is rollouts.samples


def test_windows_change_after_all_rewards_are_computed():
    """The completions of a rollout are all rated by the windows as they stood before it."""
    rewards = {"nuanced": NuancedReward({}, window=2, min_window=1), "hard": HardReward()}
    of_two = GRPOConfig(per_device_train_batch_size=4, num_generations=2, steps_per_generation=1)
    rollouts = Rollouts([example()], rewards, of_two)
    rollouts.examples = [example("e1"), example("e2")]
    policy = SimpleNamespace(encoder=SimpleNamespace(decode=decode, text_length=len))
    groups = [[completion(1), completion(2)], [completion(1), completion(4)]]
    expected = built_again(groups)
    rollouts.reward(groups, policy)  # type: ignore[arg-type]  # only its decoder is asked
    assert [s.rewards["nuanced"].total for s in rollouts.samples] == expected
    # Of e1 both answers can be read, of e2 the second: 3 predictions of 2 images.
    assert rewards["nuanced"].state_dict() == {
        "images": [[["Edema"], ["Edema", "Pneumonia"]], [["Edema"], ["Edema"]]]
    }


def built_again(groups: list[list[Completion]]) -> list[float]:
    samples = build_samples(
        [example("e1"), example("e2")],
        groups,
        decode,
        {"nuanced": NuancedReward({}, window=2, min_window=1)},
        "nuanced",
        answer_format="think_solution",
        mask_truncated_completions=False,
        text_length=len,
        length_of="completion",
    )
    return [s.rewards["nuanced"].total for s in samples]
