"""Protect decoding with static shapes: other shapes, the same completions.

The reference is a sampler without cache, masks of its own or buffers (tests/helpers/plain.py): a
whole forward for every token. The steps of a GPU are set on the CPU.

Run: pytest tests/engine/test_decoding.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.prompts import Prompt
from engine.completion import SamplingConfig
from engine.decoding import STEPS, DecodingStep, DecodingSteps
from engine.encode import EncodedPrompt
from engine.generate import generate
from engine.policy import Policy
from tests.helpers import plain
from tests.helpers.tiny import (
    SAVE,
    attach_random_adapter,
    examples_of,
    load,
    policy_of,
    uniform_for,
    with_features,
)

LENGTH = 22
# Small enough that 22 tokens take several lengths and sizes.
SMALL = DecodingSteps(look_every=4, length=8, sizes=(1 / 2, 1 / 4, 1 / 8), graphs=False)
CARD = dataclasses.replace(STEPS["cuda"], graphs=False)
STEPS_AS_SHIPPED = dict(STEPS)
SHORT, LONG = Prompt("short", "Which?"), Prompt("long", "A longer question, if you please?")


@pytest.fixture(scope="module", params=list(SAVE))
def family(request) -> str:
    return request.param


def loaded(checkpoint, images, dtype=torch.float32) -> tuple[Policy, list[EncodedPrompt]]:
    """Load a model with an adapter, and three prompts of different lengths."""
    base = load(checkpoint, dtype=dtype)
    net = attach_random_adapter(base)
    texts = zip(examples_of(images, 56, 112, 84), (SHORT, LONG, SHORT), strict=True)
    prompts = [with_features(base, base.encoder.encode_prompt(*pair)) for pair in texts]
    return policy_of(net.eval(), base), prompts


@pytest.fixture(scope="module")
def policy_and_prompts(family, tiny_checkpoint, tiny_images):
    return loaded(tiny_checkpoint(family), tiny_images)


def stopping_at(policy: Policy, stops) -> Policy:
    return dataclasses.replace(
        policy, base=dataclasses.replace(policy.base, stop_ids=frozenset(stops))
    )


def written(policy, prompts, generations=4, length=LENGTH, seed=0, **more):
    return generate(
        policy,
        prompts,
        SamplingConfig(more.pop("temperature", 0.9), 0.9, length),
        num_generations=generations,
        uniform=uniform_for(len(prompts), generations, length, seed),
        **more,
    )


def ragged(policy, prompts, **more) -> Policy:
    """Give a policy stop ids with which its completions have many lengths."""
    endless = written(stopping_at(policy, {-1}), prompts, **more)
    return stopping_at(
        policy, torch.cat([one.ids for group in endless for one in group])[::19].tolist()
    )


def same(groups, others, tolerance: float) -> None:
    for one, other in zip(sum(groups, []), sum(others, []), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.truncated == other.truncated
        for name in ("logprobs", "top_p_mass"):
            torch.testing.assert_close(
                getattr(one, name), getattr(other, name), rtol=0, atol=tolerance
            )


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, int, int]]:
    """Record the shape of every token that is read: (rows, size of the prompts, length)."""
    seen: list[tuple[int, int, int]] = []
    read = DecodingStep.read

    def watched(self, *shape):
        seen.append(shape)
        return read(self, *shape)

    monkeypatch.setattr(DecodingStep, "read", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("steps", [STEPS["cpu"], SMALL, CARD], ids=["cpu", "small", "card"])
def test_completions_are_the_plain_samplers(policy_and_prompts, monkeypatch, steps, temperature):
    policy, prompts = policy_and_prompts
    policy = ragged(policy, prompts)
    monkeypatch.setitem(STEPS, "cpu", steps)
    found = written(policy, prompts, temperature=temperature)
    config = SamplingConfig(temperature, 0.9, LENGTH)
    expected = [
        [plain.sampled(policy, prompt, own, config) for own in numbers]
        for prompt, numbers in zip(prompts, uniform_for(3, 4, LENGTH), strict=True)
    ]
    same(found, expected, 1e-5)
    lengths = {len(one.ids) for group in found for one in group}
    assert len(lengths) > (1 if temperature == 0 else 4)


TURNS = (0, 1, 2, 1, 0, 2, 1)  # prompts that are decoded a few at a time


@pytest.mark.parametrize("steps", [SMALL, CARD], ids=["small", "card"])
@pytest.mark.parametrize("max_rows", [None, 9, 4, 2])
def test_steps_change_no_completion(policy_and_prompts, max_rows, steps, monkeypatch):
    policy, three = policy_and_prompts
    prompts = [three[i] for i in TURNS]
    policy = ragged(policy, prompts)
    expected = written(policy, prompts, max_rows=max_rows, whole_groups=False)
    assert len({len(one.ids) for group in expected for one in group}) > 4
    monkeypatch.setitem(STEPS, "cpu", steps)
    told = []
    found = written(
        policy,
        prompts,
        max_rows=max_rows,
        whole_groups=False,
        on_finished=lambda i, group: told.append((i, group)),
    )
    same(found, expected, 5e-6)
    assert sorted(i for i, _ in told) == list(range(len(prompts)))
    assert all(group is found[i] for i, group in told)


@pytest.mark.parametrize("steps", [SMALL, CARD], ids=["small", "card"])
def test_in_bf16_only_rounding_differs(family, tiny_checkpoint, tiny_images, steps, monkeypatch):
    """bf16 rounds a product of another length otherwise, so that a draw at a border may change."""
    policy, three = loaded(tiny_checkpoint(family), tiny_images, torch.bfloat16)
    prompts = [three[i] for i in TURNS]
    policy = ragged(policy, prompts)
    expected = written(policy, prompts, max_rows=12)
    monkeypatch.setitem(STEPS, "cpu", steps)
    found = written(policy, prompts, max_rows=12)
    whole = 0
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        pairs = list(zip(one.ids.tolist(), other.ids.tolist(), strict=False))
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        whole += alike == len(one.ids) == len(other.ids)
        for name in ("logprobs", "top_p_mass"):
            of_one, of_other = getattr(one, name)[:alike], getattr(other, name)[:alike]
            torch.testing.assert_close(of_one, of_other, rtol=0, atol=0.1)
    assert whole > 0.8 * 28


# ---- shapes --------------------------------------------------------------------------------------
def test_512_tokens_have_at_most_twelve_shapes(policy_and_prompts, shapes, monkeypatch):
    """Eight lengths of 64, and three changes of size that each add one shape at most."""
    policy, prompts = policy_and_prompts
    policy, length = ragged(policy, prompts, length=512, generations=8), 512
    policy = stopping_at(policy, sorted(policy.base.stop_ids)[:2])
    monkeypatch.setitem(STEPS, "cpu", CARD)
    shapes.clear()
    groups = written(policy, prompts, length=length, generations=8)
    assert max(len(one.ids) for group in groups for one in group) > 400
    sizes = [rows for rows, _, _ in shapes]
    assert sizes == sorted(sizes, reverse=True) and set(sizes) <= {24, 12, 6, 3}
    assert len(set(sizes)) > 1
    assert {length for _, _, length in shapes} <= set(range(64, 513, 64))
    assert len({size for _, size, _ in shapes}) == 1 and shapes[0][1] % 64 == 0
    assert len(set(shapes)) <= 12


def test_a_length_holds_the_token_that_is_read_and_no_more(policy_and_prompts, shapes, monkeypatch):
    """Tokens 1 to 8 need a length of 8, tokens 9 to 16 of 16, and so on."""
    policy, prompts = policy_and_prompts
    monkeypatch.setitem(STEPS, "cpu", SMALL)
    written(stopping_at(policy, {-1}), prompts[:1], length=20)
    # the last token is not read
    assert [length for _, _, length in shapes] == [8] * 8 + [16] * 8 + [24] * 3
    shapes.clear()
    monkeypatch.setitem(STEPS, "cpu", STEPS_AS_SHIPPED["cpu"])
    written(stopping_at(policy, {-1}), prompts[:1], length=20)
    assert [length for _, _, length in shapes] == list(range(1, 20))


def test_rows_stay_until_half_of_them_hold_all_that_go_on(policy_and_prompts, shapes, monkeypatch):
    """Sizes of 8 rows are 4, 2 and 1; they are looked at after every fourth token."""
    policy, prompts = policy_and_prompts
    [endless] = written(stopping_at(policy, {-1}), prompts[:1], generations=8, length=40)
    # five of the eight stop there at the latest
    policy = stopping_at(policy, {int(endless[i].ids[5 + 7 * i]) for i in range(5)})
    monkeypatch.setitem(STEPS, "cpu", SMALL)
    shapes.clear()
    [group] = written(policy, prompts[:1], generations=8, length=40)
    lengths = [len(one.ids) for one in group]
    expected = []
    rows = 8
    for token in range(1, max(lengths) + 1):
        looked = token % 4 == 0
        if looked and not any(length > token for length in lengths) or token == 40:
            break
        expected.append(rows)
        left = sum(length > token for length in lengths)
        rows = min(
            [size for size in (8, 4, 2, 1) if size >= left and size <= rows] if looked else [rows]
        )
    assert [rows for rows, _, _ in shapes] == expected and len(set(expected)) > 1
