"""Protect what must hold for any input of the objective.

Checked: gradients by finite differences, masked slots, micro-batches, order, NaN.

A check takes the module under test as its argument `objective`, so that test_breaks.py can hand it
a broken one.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

import rl.objective
from tests.helpers.objective import MAX_COMPLETION_LENGTH, random_batch, step_weights

LOSS_TYPES = ("dr_grpo", "grpo", "dapo")
ESTIMATORS = ("k1", "k2", "k3")
SCALES = ("none", "group", "batch")
SEEDS = (0, 2, 3, 9)
TOLERANCE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def objective():
    return rl.objective


def evaluate(objective, batch, loss_type="dr_grpo", rows=slice(None), num_tokens=15, **settings):
    """Compute (loss, gradient, terms, metrics) of some rows of a batch.

    The totals are those of the whole batch.
    """
    batch = {name: values[rows] for name, values in batch.items()}
    config = objective.ObjectiveConfig(loss_type=loss_type, **settings)
    logprobs = batch["logprobs"].clone().requires_grad_()
    weights = step_weights(objective, batch["mask"], loss_type, num_tokens, logprobs.dtype)
    loss, terms = objective.grpo_loss(
        logprobs,
        batch["old_logprobs"],
        batch["ref_logprobs"],
        batch["advantages"],
        batch["mask"],
        weights,
        config,
        sampling_logprobs=batch["sampling_logprobs"],
        entropy=batch["entropy"],
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    terms = {name: term.detach() for name, term in terms.items()}
    return (
        loss.detach(),
        gradient,
        terms,
        objective.objective_metrics(terms, batch["advantages"], batch["mask"], config),
    )


def combine(micro_batches):
    """Combine the metrics of micro-batches into those of the step, each by its reduction."""
    combined = {}
    for name in {name for metrics in micro_batches for name in metrics}:
        found = [metrics[name] for metrics in micro_batches if name in metrics]
        values = torch.stack([metric.value for metric in found])
        weights = torch.tensor([metric.weight for metric in found])
        mean = (values * weights).sum() / weights.sum()
        combined[name] = {"mean": mean, "min": values.min(), "max": values.max()}[
            found[0].reduction
        ]
    return combined


def assert_same_metrics(actual, expected) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=0,
            atol=1e-10 if value.dtype == torch.float64 else 1e-7,
            msg=name,
        )


def values_of(metrics):
    return {name: metric.value for name, metric in metrics.items()}


# Gradients


@pytest.mark.parametrize("seed", SEEDS)
def test_the_random_batches_reach_every_quadrant(seed):
    """Ratio below, inside and above the interval, each with a positive and with a negative
    advantage, on real tokens.
    """
    batch = random_batch(seed)
    ratio = (batch["logprobs"] - batch["old_logprobs"]).exp()
    side = (ratio > 1.22).long() - (ratio < 0.85).long()  # [6,5]
    sign = batch["advantages"].sign().long()[:, None].expand(6, 5)
    reached = set(zip(side[batch["mask"]].tolist(), sign[batch["mask"]].tolist(), strict=True))
    assert reached >= set(itertools.product((-1, 0, 1), (-1, 1)))


@pytest.mark.parametrize("beta", [0.0, 0.15, 3.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_by_central_differences(objective, loss_type, estimator, beta):
    """d loss / d logprobs, slot by slot, against (loss(+h) - loss(-h)) / 2h, whose error is of the
    order of h^2.
    """
    batch, h = random_batch(seed=0), 1e-5
    mask, numbers = batch["mask"], torch.zeros(6, 5, dtype=torch.float64)
    config = objective.ObjectiveConfig(loss_type=loss_type, kl_estimator=estimator, beta=beta)
    weights = step_weights(objective, mask, loss_type)

    def loss_at(logprobs):
        ref_logprobs = batch["ref_logprobs"] if beta else None
        return objective.grpo_loss(
            logprobs,
            batch["old_logprobs"],
            ref_logprobs,
            batch["advantages"],
            mask,
            weights,
            config,
        )[0]

    for index in itertools.product(range(6), range(5)):
        step = torch.zeros(6, 5, dtype=torch.float64)
        step[index] = h
        numbers[index] = (loss_at(batch["logprobs"] + step) - loss_at(batch["logprobs"] - step)) / (
            2 * h
        )
    logprobs = batch["logprobs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(logprobs), logprobs)
    torch.testing.assert_close(gradient, numbers, rtol=1e-6, atol=1e-9)
    assert (gradient[mask] != 0).any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_random_inputs_by_gradcheck(objective, loss_type):
    config = objective.ObjectiveConfig(loss_type=loss_type)

    def loss(logprobs, batch):
        return objective.grpo_loss(
            logprobs,
            batch["old_logprobs"],
            batch["ref_logprobs"],
            batch["advantages"],
            batch["mask"],
            step_weights(objective, batch["mask"], loss_type),
            config,
        )[0]

    for seed in SEEDS:
        batch = random_batch(seed)
        assert torch.autograd.gradcheck(
            partial(loss, batch=batch), batch["logprobs"].requires_grad_()
        )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_before_the_first_update(objective, loss_type, estimator):
    """pi = pi_old = pi_ref: the ratio is exactly 1, KL and its gradient exactly 0, the gradient
    REINFORCE's, exactly -A w.
    """
    batch = random_batch(seed=2)
    batch |= {"old_logprobs": batch["logprobs"].clone(), "ref_logprobs": batch["logprobs"].clone()}
    _, gradient, terms, metrics = evaluate(objective, batch, loss_type, kl_estimator=estimator)
    weights = step_weights(objective, batch["mask"], loss_type)
    assert torch.equal(terms["ratio"], torch.ones(6, 5, dtype=torch.float64))
    assert torch.equal(terms["kl"], torch.zeros(6, 5, dtype=torch.float64))
    assert torch.equal(gradient, -batch["advantages"][:, None] * weights)
    assert metrics["ratio/min"].value == metrics["ratio/max"].value == 1
    assert (
        metrics["kl"].value
        == metrics["approx_kl_old"].value
        == metrics["clip_ratio/region_mean"].value
        == 0
    )


def test_kl_acts_where_the_advantage_is_zero(objective):
    """A group without a preference is still pulled towards the reference: the gradient is beta w (1
    - pi_ref/pi).
    """
    batch = random_batch(seed=3)
    batch |= {
        "advantages": torch.zeros(6, dtype=torch.float64),
        "ref_logprobs": batch["logprobs"] - math.log(2),
    }
    _, gradient, _, _ = evaluate(objective, batch, beta=0.3)
    expected = 0.3 * 0.5 / (6 * MAX_COMPLETION_LENGTH)  # pi_ref/pi = 1/2 everywhere
    torch.testing.assert_close(
        gradient, batch["mask"] * torch.tensor(expected, dtype=torch.float64), **TOLERANCE
    )


# Masked slots

GARBAGE = (math.nan, math.inf, -math.inf, 1e30, 0.0)
TOKEN_INPUTS = ("logprobs", "old_logprobs", "ref_logprobs", "sampling_logprobs", "entropy")


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("names", [*((name,) for name in TOKEN_INPUTS), TOKEN_INPUTS], ids="+".join)
def test_masked_slots_change_nothing(objective, names, garbage):
    """Bit by bit: loss, gradient, the terms of real tokens and metrics. The gradient of a masked
    slot is exactly 0.
    """
    batch = random_batch(seed=4)
    spoilt = batch | {name: torch.where(batch["mask"], batch[name], garbage) for name in names}
    for loss_type in LOSS_TYPES:
        loss, gradient, terms, metrics = evaluate(objective, batch, loss_type)
        spoilt_loss, spoilt_gradient, spoilt_terms, spoilt_metrics = evaluate(
            objective, spoilt, loss_type
        )
        assert torch.equal(spoilt_loss, loss)
        assert torch.equal(spoilt_gradient, gradient)
        assert torch.equal(spoilt_gradient[~batch["mask"]], torch.zeros(15, dtype=torch.float64))
        for name, term in terms.items():
            assert torch.equal(spoilt_terms[name][batch["mask"]], term[batch["mask"]]), name
            # so that a fork may multiply a term by a mask
            assert spoilt_terms[name].isfinite().all(), name
        assert spoilt_metrics == metrics


# 0.1 and 9 are outside the interval of the ratio
@pytest.mark.parametrize("garbage", [math.nan, 0.1, 9.0])
def test_metrics_read_real_tokens_only(objective, garbage):
    for sign in (-1, 1):
        batch = random_batch(seed=4)
        batch["advantages"] = torch.full((6,), sign, dtype=torch.float64)
        batch["mask"][:, -1] = False  # so that each completion has a masked slot
        _, _, terms, metrics = evaluate(objective, batch)
        spoilt = {name: torch.where(batch["mask"], term, garbage) for name, term in terms.items()}
        assert (
            objective.objective_metrics(
                spoilt, batch["advantages"], batch["mask"], objective.ObjectiveConfig()
            )
            == metrics
        )


def test_masked_slots_carry_no_loss(objective):
    """Not even with weights that are not 0 there."""
    batch = random_batch(seed=4)
    _, terms = objective.grpo_loss(
        batch["logprobs"],
        batch["old_logprobs"],
        batch["ref_logprobs"],
        batch["advantages"],
        batch["mask"],
        torch.ones(6, 5, dtype=torch.float64),
        objective.ObjectiveConfig(),
    )
    assert torch.equal(
        terms["per_token_loss"][~batch["mask"]], torch.zeros(15, dtype=torch.float64)
    )
    assert (terms["per_token_loss"][batch["mask"]] != 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_are_zero_where_masked_and_positive_elsewhere(objective, loss_type):
    mask = random_batch(seed=5)["mask"]
    weights = step_weights(objective, mask, loss_type)
    assert torch.equal(weights > 0, mask) and (weights[~mask] == 0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_padding_changes_nothing(objective, loss_type):
    """Columns of garbage on the left, in the middle and on the right."""
    batch = random_batch(seed=6)
    # where the five columns of the batch go
    columns = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0]).bool()

    def padded(values):
        wide = torch.full((6, len(columns)), math.nan, dtype=torch.float64)
        wide[:, columns] = values
        return wide

    wide = (
        batch
        | {name: padded(batch[name]) for name in TOKEN_INPUTS}
        | {"mask": padded(batch["mask"].double()) == 1}
    )
    loss, gradient, _, metrics = evaluate(objective, batch, loss_type)
    wide_loss, wide_gradient, _, wide_metrics = evaluate(objective, wide, loss_type)
    torch.testing.assert_close(wide_loss, loss, **TOLERANCE)
    torch.testing.assert_close(wide_gradient[:, columns], gradient, **TOLERANCE)
    assert (wide_gradient[:, ~columns] == 0).all()
    assert_same_metrics(values_of(wide_metrics), values_of(metrics))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_completion_without_tokens(objective, loss_type):
    """It counts as a completion of the step and adds nothing, to the metrics neither."""
    batch = random_batch(seed=7)
    empty = int((~batch["mask"].any(1)).nonzero())
    others = [row for row in range(6) if row != empty]
    loss, gradient, _, metrics = evaluate(objective, batch, loss_type)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[empty] == 0).all()
    loss_of_others, _, _, metrics_of_others = evaluate(objective, batch, loss_type, rows=others)
    torch.testing.assert_close(loss, loss_of_others, **TOLERANCE)
    assert_same_metrics(values_of(metrics), values_of(metrics_of_others))


# of the step: all of it masked, or only this micro-batch
@pytest.mark.parametrize("num_tokens", [0, 15])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_tokens_is_zero(objective, loss_type, num_tokens):
    batch = random_batch(seed=8)
    batch["mask"] = torch.zeros(6, 5, dtype=torch.bool)
    batch["logprobs"] = batch["logprobs"] * math.nan
    loss, gradient, _, metrics = evaluate(objective, batch, loss_type, num_tokens=num_tokens)
    assert loss == 0 and (gradient == 0).all()
    assert metrics == {}


# Micro-batches and order


def partitions(rows):
    """List all ways to deal the rows into micro-batches."""
    if not rows:
        return [[]]
    return [
        [[rows[0], *chosen], *rest]
        for size in range(len(rows))
        for chosen in itertools.combinations(rows[1:], size)
        for rest in partitions([row for row in rows[1:] if row not in chosen])
    ]


def test_partitions_are_all_there():
    assert len(partitions(list(range(4)))) == 15  # Bell numbers: 1, 1, 2, 5, 15, 52, 203
    assert len(partitions(list(range(6)))) == 203


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(objective, loss_type):
    """Loss and gradients sum, metrics combine by their reduction, for each of the 203 ways to cut
    six completions.

    Groups are cut as well: advantages are made before. One completion has no token, so some
    micro-batch may have none either.
    """
    batch = random_batch(seed=9)
    loss, gradient, _, metrics = evaluate(objective, batch, loss_type)
    alone = {}  # a micro-batch turns up in many partitions
    for partition in partitions(list(range(6))):
        for rows in partition:
            if tuple(rows) not in alone:
                alone[tuple(rows)] = evaluate(objective, batch, loss_type, rows=rows)
        parts = [alone[tuple(rows)] for rows in partition]
        torch.testing.assert_close(sum(part[0] for part in parts), loss, **TOLERANCE)
        summed = torch.zeros(6, 5, dtype=torch.float64)
        for rows, part in zip(partition, parts, strict=True):
            summed[rows] += part[1]
        torch.testing.assert_close(summed, gradient, **TOLERANCE)
        assert_same_metrics(combine([part[3] for part in parts]), values_of(metrics))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_order_of_completions_does_not_matter(objective, loss_type):
    batch, order = random_batch(seed=10), [3, 0, 5, 1, 4, 2]
    loss, gradient, _, metrics = evaluate(objective, batch, loss_type)
    moved_loss, moved_gradient, _, moved_metrics = evaluate(objective, batch, loss_type, rows=order)
    torch.testing.assert_close(moved_loss, loss, **TOLERANCE)
    torch.testing.assert_close(moved_gradient, gradient[order], **TOLERANCE)
    assert_same_metrics(values_of(moved_metrics), values_of(metrics))


# Advantages

REWARDS = torch.tensor([1.0, 0.2, 0.0, 0.7, 0.4, 0.4, 0.9, 0.1, 0.4], dtype=torch.float64)
GROUP_IDS = torch.tensor([2, 0, 2, 0, 1, 1, 0, 2, 1])  # not contiguous; group 1 has one reward only


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_advantages_follow_the_group_ids(objective, scale_rewards):
    advantages = objective.group_advantages(REWARDS, GROUP_IDS, scale_rewards)
    for group in range(3):
        assert advantages[group == GROUP_IDS].sum().abs() < 1e-12
    assert (advantages[GROUP_IDS == 1] == 0).all() and (advantages[GROUP_IDS != 1] != 0).all()
    renamed = torch.tensor([-4, 10**12, 3])[GROUP_IDS]  # only equality of ids counts
    torch.testing.assert_close(
        objective.group_advantages(REWARDS, renamed, scale_rewards), advantages, **TOLERANCE
    )
    order = torch.tensor([8, 2, 0, 5, 1, 7, 3, 6, 4])
    moved = objective.group_advantages(REWARDS[order], GROUP_IDS[order], scale_rewards)
    torch.testing.assert_close(moved, advantages[order], **TOLERANCE)
    # a bonus for a whole group says nothing
    raised = objective.group_advantages(REWARDS + 5 * GROUP_IDS, GROUP_IDS, "none")
    torch.testing.assert_close(
        raised, objective.group_advantages(REWARDS, GROUP_IDS, "none"), **TOLERANCE
    )


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_equal_rewards_give_exactly_zero(objective, scale_rewards):
    """Residue included: 0.1 + 0.2 is not 0.3, and a standard deviation of 1e-17 would make a
    preference of it.
    """
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3 + 9e-7, 5.0, 0.0, 0.5], dtype=torch.float64)
    group_ids = torch.tensor([0, 0, 0, 1, 2, 2])  # group 1 is a single completion
    advantages = objective.group_advantages(rewards, group_ids, scale_rewards)
    assert (advantages[:4] == 0).all()
    assert advantages[4] < 0 < advantages[5]


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_nan_rewards_are_left_out(objective, scale_rewards):
    """The rated completions get what they would get without the others; those get 0."""
    nan = math.nan
    rewards = torch.tensor([1.0, nan, 0.0, nan, nan, 3.0, nan], dtype=torch.float64)
    group_ids = torch.tensor([0, 0, 0, 1, 1, 2, 2])  # some rated, none rated, one rated
    rated = torch.tensor([0, 2, 5])
    advantages = objective.group_advantages(rewards, group_ids, scale_rewards)
    assert torch.equal(
        advantages[rated],
        objective.group_advantages(rewards[rated], group_ids[rated], scale_rewards),
    )
    assert (advantages[[1, 3, 4, 5, 6]] == 0).all() and advantages[0] > 0 > advantages[2]
    assert objective.group_advantages(rewards[:0], group_ids[:0], scale_rewards).shape == (0,)


# Numbers


def test_k3_in_float32_is_precise_and_not_negative(objective):
    """Where the policies nearly agree, exp(d) - 1 - d would be rounding error; at d = 0.001 the
    series is d^2/2 + d^3/6.
    """
    d = torch.tensor([1e-3, -1e-3])
    expected = torch.tensor([5e-7 + 1e-9 / 6, 5e-7 - 1e-9 / 6])
    torch.testing.assert_close(
        objective.kl_estimate(torch.zeros(2), d), expected, rtol=1e-3, atol=0
    )
    for span in (5, 0.01, 1e-4):
        kl = objective.kl_estimate(torch.zeros(2001), torch.linspace(-span, span, 2001))
        assert (kl > -1e-9).all()  # but for the last digit of expm1


def test_float32_stays_float32(objective):
    batch = {
        name: values if name == "mask" else values.float()
        for name, values in random_batch(seed=11).items()
    }
    assert objective.group_advantages(REWARDS.float(), GROUP_IDS, "batch").dtype == torch.float32
    for loss_type in LOSS_TYPES:
        loss, gradient, terms, metrics = evaluate(objective, batch, loss_type)
        tensors = [loss, gradient, *terms.values(), *(metric.value for metric in metrics.values())]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert all(metric.value.shape == () for metric in metrics.values()) and loss.shape == ()
        exact, _, _, _ = evaluate(objective, random_batch(seed=11), loss_type)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_without_beta_the_reference_is_not_needed(objective):
    batch = random_batch(seed=12)
    loss, _, _, _ = evaluate(objective, batch, beta=0)
    weights, config = (
        step_weights(objective, batch["mask"], "dr_grpo"),
        objective.ObjectiveConfig(beta=0),
    )
    without, terms = objective.grpo_loss(
        batch["logprobs"],
        batch["old_logprobs"],
        None,
        batch["advantages"],
        batch["mask"],
        weights,
        config,
    )
    assert torch.equal(without, loss)
    assert (terms["kl"] == 0).all()


def test_inputs_are_left_alone(objective):
    batch = random_batch(seed=13)
    before = {name: values.clone() for name, values in batch.items()}
    evaluate(objective, batch)
    rewards = REWARDS.clone()
    objective.group_advantages(rewards, GROUP_IDS, "group")
    assert torch.equal(rewards, REWARDS)
    assert all(torch.equal(batch[name], values) for name, values in before.items())
