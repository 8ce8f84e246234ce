"""Protects the path from completions to micro-batches and back: rewards and masks of samples,
advantages by group, padding, old and reference log-probabilities, the metrics of a rollout by hand,
and a rollout that survives a checkpoint bit for bit. Run: pytest tests/rl/test_rollout.py
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import rl.rollout
from data.examples import read_jsonl
from data.prompts import Prompt
from engine.encode import EncodedPrompt
from engine.forward import completion_logprobs
from engine.generate import Completion, SamplingConfig, generate
from engine.model import add_reference, attach_adapter, load_model
from rl.logs import (
    completion_rows,
    mismatch_metrics,
    pack_samples,
    rollout_metrics,
    unpack_samples,
)
from rl.objective import ObjectiveConfig
from rl.rewards import HardReward, NuancedReward, Reward
from rl.rollout import (
    Sample,
    build_samples,
    collate_samples,
    plan_micro_batches,
    score_samples,
    with_advantages,
    with_old,
)
from tests.helpers.rollouts import ANSWERS, example, sample

SHORT = Prompt("short", "Which?")
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
    )


def test_samples_carry_every_reward_of_their_own_completion():
    samples = built(
        {"hard": HardReward(length_penalty=0.1, min_length=4), "nuanced": NuancedReward({})}, "hard"
    )
    assert [(s.prompt, s.example.id, s.text) for s in samples] == [
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
    assert nuanced.state_dict() == before == {"predictions": []}


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
        )


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
    assert [s.advantage for s in with_advantages(samples, ObjectiveConfig())] == [
        0.5,
        -0.5,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert [s.advantage for s in samples] == [0.0] * 6  # the samples given are not changed
    # Standard deviation of 1, 0, 0.5 with ddof 1 is 0.5: 0.5 / (0.5 + 1e-4)
    assert with_advantages(samples, ObjectiveConfig(scale_rewards="group"))[
        0
    ].advantage == pytest.approx(0.5 / 0.5001, abs=1e-12)


def test_what_forks_are_given_of_the_advantages(monkeypatch):
    """The KL of each completion, over the tokens in the loss, and the whole configuration."""
    given = {}
    monkeypatch.setattr(
        rl.rollout,
        "group_advantages",
        lambda rewards, groups, scale, **more: given.update(more) or rewards,
    )
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
        sample(0, 0.0, mask=torch.zeros(2, dtype=torch.bool)),
    ]
    config = ObjectiveConfig(beta=0.5)
    with_advantages(samples, config)
    # (-1 + 1.5) + (-3 + 2.75) = 0.5 - 0.25; the second token alone, -1 + 1.25; nothing
    assert given["kl"].tolist() == [0.25, 0.25, 0.0] and given["kl"].dtype == torch.float64
    assert given["config"] is config


# ---- micro-batches -------------------------------------------------------------------------------
def test_micro_batches_are_planned_in_order():
    prompts = [
        EncodedPrompt(torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.long), {})
        for _ in range(2)
    ]
    samples = [sample(i // 4, 0.0, length=i + 1) for i in range(8)]
    plan = partial(plan_micro_batches, samples, prompts)
    assert plan(size=4, accumulation=1, max_tokens=None) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert plan(size=2, accumulation=2, max_tokens=None) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    # 10 + 1 + 2 + 3 = 16 fit, 4 more do not: 10 + 4; then 10 + 5, 10 + 6, ... each alone
    assert plan(size=4, accumulation=1, max_tokens=17) == [[[0, 1, 2], [3]], [[4], [5], [6], [7]]]


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
            ref_logprobs=None,
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


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def rollout(request, tiny_checkpoint, tiny_sft_run, tiny_data):
    """(wrapped, model, samples, prompts): six completions of two prompts; `default` is the base,
    `reference` is SFT.
    """
    model = load_model(
        str(tiny_checkpoint(request.param)),
        dtype=torch.float32,
        device=CPU,
        min_visual_tokens=4,
        max_visual_tokens=4,
    )
    wrapped: PeftModel = attach_adapter(model, tiny_sft_run(request.param), trainable=True)
    add_reference(wrapped, tiny_sft_run(request.param))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B.default" in name:
                parameter.zero_()
    examples = read_jsonl(tiny_data)[:2]
    prompts = [model.encode_prompt(e, SHORT) for e in examples]
    completions = generate(
        wrapped,
        model,
        prompts,
        SamplingConfig(0.8, 0.95, 5),
        num_generations=3,
        generator=torch.Generator().manual_seed(0),
    )
    samples = build_samples(
        examples,
        completions,
        model.encoder.decode,
        {"hard": HardReward()},
        "hard",
        answer_format="think_solution",
        mask_truncated_completions=False,
    )
    return wrapped, model, samples, prompts


def test_old_and_reference_log_probabilities_are_of_the_right_adapter(rollout):
    wrapped, model, samples, prompts = rollout
    flags = {name: parameter.requires_grad for name, parameter in wrapped.named_parameters()}
    wrapped.train()
    scored = score_samples(
        wrapped,
        model,
        samples,
        prompts,
        [[], [[0, 1, 2, 3], [4, 5]]],
        temperature=0.8,
        with_reference=True,
    )
    assert wrapped.training and wrapped.active_adapter == "default"
    assert flags == {
        name: parameter.requires_grad for name, parameter in wrapped.named_parameters()
    }
    wrapped.eval()
    for before, after in zip(samples, scored, strict=True):
        assert (
            torch.equal(before.ids, after.ids)
            and after.old_logprobs.dtype == after.ref_logprobs.dtype == torch.float32
        )
        assert not after.old_logprobs.requires_grad and not after.ref_logprobs.requires_grad
        torch.testing.assert_close(
            after.old_logprobs, before.sampling_logprobs, atol=1e-5, rtol=0
        )  # what the sampler drew from
        batch = collate_samples([before], prompts, model.encoder.pad_token_id, CPU).batch
        with torch.no_grad(), wrapped.disable_adapter():  # `default` has B = 0, so it is the base
            alone, _ = completion_logprobs(
                wrapped,
                model.family,
                batch,
                temperature=0.8,
                suppress_token_ids=model.suppressed_ids,
            )
        torch.testing.assert_close(after.old_logprobs, alone[0], atol=1e-5, rtol=0)
        assert (after.ref_logprobs - after.old_logprobs).abs().max() > 1e-3
    by_hand = reference_by_hand(wrapped, model, samples, prompts)
    for after, expected in zip(scored, by_hand, strict=True):
        torch.testing.assert_close(after.ref_logprobs, expected, atol=1e-5, rtol=0)


def reference_by_hand(wrapped, model, samples, prompts) -> list[torch.Tensor]:
    """Log-probabilities under the SFT adapter, by copying its B matrices into `default` for a
    moment.
    """
    parameters = dict(wrapped.named_parameters())
    policy = {name: parameter for name, parameter in parameters.items() if "lora_B.default" in name}
    with torch.no_grad():
        for name, parameter in policy.items():
            parameter.copy_(parameters[name.replace(".default.", ".reference.")])
        found = []
        for item in samples:
            batch = collate_samples([item], prompts, model.encoder.pad_token_id, CPU).batch
            found.append(
                completion_logprobs(
                    wrapped,
                    model.family,
                    batch,
                    temperature=0.8,
                    suppress_token_ids=model.suppressed_ids,
                )[0][0]
            )
        for parameter in policy.values():
            parameter.zero_()
    return found


def test_without_a_reference_pass_the_reference_is_the_policy(rollout):
    wrapped, model, samples, prompts = rollout
    scored = score_samples(
        wrapped,
        model,
        samples,
        prompts,
        [[[0, 1, 2], [3, 4, 5]]],
        temperature=0.8,
        with_reference=False,
    )
    assert all(torch.equal(s.ref_logprobs, s.sampling_logprobs) for s in scored)


def test_the_first_steps_old_log_probabilities_are_left_to_it(rollout, monkeypatch):
    """They are its own, to the last bit: those that a pass before the step would have found."""
    wrapped, model, samples, prompts = rollout
    passes, forward = [], rl.rollout.completion_logprobs
    monkeypatch.setattr(
        rl.rollout,
        "completion_logprobs",
        lambda *given, **more: passes.append(wrapped.active_adapter) or forward(*given, **more),
    )
    settings = {"temperature": 0.8, "with_reference": True}
    scored = score_samples(
        wrapped, model, samples, prompts, [[[0, 1], [2]], [[3, 4, 5]]], **settings
    )
    assert passes == ["reference", "reference", "default", "reference"]
    assert [sample.old_logprobs is None for sample in scored] == [True] * 3 + [False] * 3
    all_scored = score_samples(
        wrapped, model, samples, prompts, [[], [[0, 1], [2], [3, 4, 5]]], **settings
    )
    wrapped.train()
    for indices in ([0, 1], [2]):
        micro = collate_samples(
            [samples[i] for i in indices], prompts, model.encoder.pad_token_id, CPU
        )
        logprobs, _ = forward(
            wrapped,
            model.family,
            micro.batch,
            temperature=0.8,
            suppress_token_ids=model.suppressed_ids,
            entropy=True,
        )
        scored = with_old(scored, indices, logprobs)
    for left, made in zip(scored, all_scored, strict=True):
        assert not left.old_logprobs.requires_grad
        assert torch.equal(left.old_logprobs, made.old_logprobs) and torch.equal(
            left.ref_logprobs, made.ref_logprobs
        )


# ---- metrics by hand -----------------------------------------------------------------------------
def test_metrics_of_a_rollout_by_hand():
    def scored(prompt, reward, length, text, **fields):
        sampled = torch.full((length,), -1.0)
        old = sampled.clone()
        old[0] += fields.pop("shift", 0.0)
        return sample(
            prompt,
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
        "sampling/importance_sampling_ratio/min": 1.0,
        "sampling/importance_sampling_ratio/max": 1.6487213,
        "sampling/importance_sampling_ratio/mean": (11 + 1.6487213) / 12,
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
    (row,) = completion_rows([sample(3, 0.5, text=2, advantage=-0.25)])
    assert row == {
        "id": "e3",
        "group": 3,
        "image": "image.png",
        "labels": ["Edema"],
        "completion": ANSWERS[2],
        "completion_length": 2,
        "truncated": False,
        "predicted": ["Edema", "Pneumonia"],
        "valid": True,
        "problem": None,
        "rewards": {"hard": {"total": 0.5, "jaccard": 0.5, "length": 0.0}},
        "reward": 0.5,
        "advantage": -0.25,
    }


# ---- checkpoint ----------------------------------------------------------------------------------
def test_a_rollout_survives_a_checkpoint_bit_for_bit(rollout):
    wrapped, model, samples, prompts = rollout
    samples = [
        Sample(
            **vars(s)
            | {
                "reward": 0.1 * i,
                "rewards": {"hard": Reward(0.1 * i, {"jaccard": 0.1 * i, "length": -0.0})},
            }
        )
        for i, s in enumerate(samples)
    ]
    samples = score_samples(
        wrapped,
        model,
        samples,
        prompts,
        [[], [[0, 1, 2, 3, 4, 5]]],
        temperature=0.8,
        with_reference=True,
    )
    samples = with_advantages(samples, ObjectiveConfig(scale_rewards="group"))
    samples[1] = Sample(
        **vars(samples[1])
        | {
            "mask": torch.zeros_like(samples[1].mask),
            "truncated": not samples[1].truncated,
        }
    )
    tensors, record = pack_samples(samples)
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    examples = list({s.example.id: s.example for s in samples}.values())
    found = unpack_samples(
        tensors, json.loads(json.dumps(record)), examples, model.encoder.decode, "think_solution"
    )
    assert len(found) == len(samples) == 6
    for before, after in zip(samples, found):
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
