"""Protect Eq. 2 by hand.

Checked: the worked cases of objective_cases.json, toy examples for a pocket calculator, and what is
refused.

A check takes the module under test as its argument `objective`, so that test_breaks.py can hand it
a broken one.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import warnings

import pytest
import torch

import rl.objective
from data.labels import canonical_label
from engine.optim import clip_gradients, learning_rate_at
from rl.rewards import jaccard
from tests.helpers.cases import CASES, NOT_IN_THE_PRODUCT, covers, leaves, open_case
from tests.helpers.objective import (
    HOSPITAL_GROUPS,
    HOSPITAL_REWARDS,
    HOSPITALS,
    close,
    f64,
    weights_of,
)
from tests.helpers.repository import ROOT

FIELDS = ("epsilon_low", "epsilon_high", "beta", "kl_estimator", "loss_type", "scale_rewards")
# the cases' names and ours
LOSS_TYPES = {"seq_mean_eq2": "grpo", "dr_grpo_const": "dr_grpo", "token_mean_dapo": "dapo"}


@pytest.fixture
def objective():
    return rl.objective


# The worked cases


def test_p01_advantages(objective, case):
    with case("P01_advantage") as p01:
        rewards = f64(p01.inputs["rewards"])  # [2,4], a group a row
        group_ids = torch.tensor([0] * 4 + [1] * 4)
        centred = objective.group_advantages(rewards.flatten(), group_ids).view(2, 4)
        scaled = objective.group_advantages(rewards.flatten(), group_ids, "group").view(2, 4)
        p01.close("adv_center_only", centred)
        p01.close("adv_std_ddof1_eps1e_4", scaled)
        p01.close("group_mean", (rewards - centred)[:, 0])  # the mean is what was taken off,
        # and the std, plus 1e-4, what it was divided by
        p01.close("group_std_ddof1", (centred / scaled)[:, 0] - 1e-4)
        p01.differs("adv_std_ddof0_eps1e_4", scaled)
        p01.differs("adv_rloo", centred)


def test_p02_zero_variance(objective, case):
    with case("P02_zero_variance") as p02:
        rewards, group_ids = f64(p02.inputs["rewards"]).flatten(), torch.tensor([0] * 4 + [1] * 4)
        centred = objective.group_advantages(rewards, group_ids).view(2, 4)
        p02.close("adv_center_only", centred)
        zero_variance = (centred == 0).all(1)  # exactly 0, not just near
        p02.close("is_zero_variance", zero_variance)
        p02.close("frac_reward_zero_std", zero_variance.double().mean())


def test_p03_clip(objective, case):
    with case("P03_clip_asymmetric") as p03:
        rows = leaves(p03.inputs["rows"])
        config = objective.ObjectiveConfig(
            epsilon_low=p03.inputs["eps_low"], epsilon_high=p03.inputs["eps_high"], beta=0
        )
        # seven completions of one token
        logprobs = f64(rows["logp"])[:, None].requires_grad_()  # [7,1]
        advantages, mask = f64(rows["advantage"]), torch.ones(7, 1, dtype=torch.bool)
        loss, terms = objective.grpo_loss(
            logprobs,
            f64(rows["old_logp"])[:, None],
            None,
            advantages,
            mask,
            torch.ones(7, 1, dtype=torch.float64),
            config,
        )
        loss.backward()
        p03.close("rows.ratio", terms["ratio"][:, 0])
        p03.close("rows.unclipped", terms["ratio"][:, 0] * advantages)
        p03.close("rows.clipped", terms["clipped_ratio"][:, 0] * advantages)
        p03.close("rows.objective", terms["surrogate"][:, 0])
        p03.close("rows.loss", terms["per_token_loss"][:, 0])
        p03.close("rows.dloss_dlogp", logprobs.grad[:, 0])

        metrics = objective.objective_metrics(terms, advantages, mask, config)
        p03.close("clip_ratio_low_mean", metrics["clip_ratio/low_mean"].value)
        p03.close("clip_ratio_high_mean", metrics["clip_ratio/high_mean"].value)
        p03.close("clip_ratio_region_mean", metrics["clip_ratio/region_mean"].value)
        rows_alone = [
            objective.objective_metrics(
                {name: term[i : i + 1] for name, term in terms.items()},
                advantages[i : i + 1],
                mask[i : i + 1],
                config,
            )
            for i in range(7)
        ]
        p03.close(
            "rows.clip_low_binding",
            [bool(row["clip_ratio/low_mean"].value == 1) for row in rows_alone],
        )
        p03.close(
            "rows.clip_high_binding",
            [bool(row["clip_ratio/high_mean"].value == 1) for row in rows_alone],
        )


def test_p04_kl_estimators(objective, case):
    with case("P04_kl_estimators") as p04:
        rows = leaves(p04.inputs["rows"])
        ref_logprobs = f64(rows["ref_logp"])[:, None]
        for estimator in ("k1", "k2", "k3"):
            logprobs = f64(rows["logp"])[:, None].requires_grad_()  # [5,1]
            kl = objective.kl_estimate(logprobs, ref_logprobs, estimator)
            kl.sum().backward()
            p04.close(f"rows.{estimator}", kl[:, 0])
            p04.close(f"rows.grad_{estimator}", logprobs.grad[:, 0])
            if estimator == "k2":  # the sentence under `identity`: the gradient of k2 is logp - ref
                close(logprobs.grad, (logprobs.detach() - ref_logprobs).tolist())
            if estimator == "k3":
                p04.differs("rows.k3_is_corrected", kl[:, 0])
                p04.differs("rows.grad_unbiased_w_k1", logprobs.grad[:, 0])


def test_p05_full_loss(objective, case):
    with case("P05_full_loss") as p05:
        given = p05.inputs
        config = objective.ObjectiveConfig(
            epsilon_low=given["eps_low"], epsilon_high=given["eps_high"], beta=given["beta"]
        )
        old_logprobs, ref_logprobs, advantages = (
            f64(given["old_logp"]),
            f64(given["ref_logp"]),
            f64(given["advantages"]),
        )
        mask = torch.tensor(given["mask"]).bool()
        for name, loss_type in LOSS_TYPES.items():
            logprobs = f64(given["logp"]).requires_grad_()  # [4,4]
            weights = weights_of(objective, mask, loss_type, given["max_completion_length"])
            loss, terms = objective.grpo_loss(
                logprobs, old_logprobs, ref_logprobs, advantages, mask, weights, config
            )
            loss.backward()
            p05.close(f"{name}.loss", loss)
            p05.close(f"{name}.policy_part", -(weights * terms["surrogate"]).sum())
            p05.close(f"{name}.kl_part", given["beta"] * (weights * terms["kl"]).sum())
            p05.close(f"{name}.grad_logp", logprobs.grad)

        metrics = objective.objective_metrics(terms, advantages, mask, config)
        p05.close("metrics.kl", metrics["kl"].value)
        p05.close("metrics.ratio_mean", metrics["ratio/mean"].value)
        p05.close("metrics.clip_ratio/low_mean", metrics["clip_ratio/low_mean"].value)
        p05.close("metrics.clip_ratio/high_mean", metrics["clip_ratio/high_mean"].value)
        p05.close("metrics.clip_ratio/region_mean", metrics["clip_ratio/region_mean"].value)
        p05.close("metrics.approx_kl_old_k1", metrics["approx_kl_old"].value)
        p05.differs("metrics.kl_seq_mean", metrics["kl"].value)


def test_p06_on_policy(objective, case):
    with case("P06_on_policy_identity") as p06:
        given = p06.inputs
        mask = torch.tensor(given["mask"]).bool()
        for name, loss_type in LOSS_TYPES.items():
            logprobs = f64(given["logp"]).requires_grad_()  # [4,4]
            weights = weights_of(objective, mask, loss_type, given["max_completion_length"])
            config = objective.ObjectiveConfig(beta=given["beta"])
            loss, _ = objective.grpo_loss(
                logprobs, logprobs.detach(), None, f64(given["advantages"]), mask, weights, config
            )
            loss.backward()
            p06.close(f"{name}.loss", loss)
            p06.close(f"{name}.grad_logp", logprobs.grad)


def test_p08_microbatches(objective, case):
    """The case gives each token's loss. With k1, beta 1, advantage 0 and a reference of 0 it is the
    log-probability itself.
    """
    with case("P08_microbatch_invariance") as p08:
        # [4,3]
        token_loss, mask = f64(p08.inputs["token_loss"]), torch.tensor(p08.inputs["mask"]).bool()
        config = objective.ObjectiveConfig(kl_estimator="k1", beta=1)

        def loss_of(rows, loss_type):
            # of the whole step
            weights = objective.token_weights(
                mask[rows],
                loss_type,
                num_completions=4,
                num_tokens=8,
                max_completion_length=p08.inputs["max_completion_length"],
                dtype=torch.float64,
            )
            logprobs, zeros = token_loss[rows], torch.zeros_like(token_loss[rows])
            return objective.grpo_loss(
                logprobs, logprobs, zeros, zeros[:, 0], mask[rows], weights, config
            )[0]

        for name, loss_type in LOSS_TYPES.items():
            full_batch = loss_of([0, 1, 2, 3], loss_type)
            contributions = torch.stack(
                [loss_of(rows, loss_type) for rows in p08.inputs["micro_batches"]]
            )
            p08.close(f"full_batch_loss.{name}", full_batch)
            p08.close(f"correct_microbatch_contributions.{name}", contributions)
            if loss_type == "dapo":
                p08.differs(
                    "naive_mean_of_microbatch_losses_divided_by_K.token_mean_dapo",
                    contributions.sum(),
                )
            if loss_type == "dr_grpo":
                p08.differs("wrong_sum_over_Lmax_times_one_over_K", contributions.sum())


def test_p10_truncated_importance_sampling(objective, case):
    """The weight is a factor of the policy term and of its gradient, and of no KL."""
    with case("P10_tis") as p10:
        old, sampling = f64(p10.inputs["old_logp"]), f64(p10.inputs["behaviour_logp"])
        mask = torch.tensor(p10.inputs["mask"]).bool()
        logprobs = (old + 0.1).requires_grad_()  # [2,3]
        advantages, weights = f64([1, -1]), weights_of(objective, mask, "dapo")
        sampling[1, 2] = math.nan  # a slot beyond the end

        def evaluate(is_on, cap=2.0, **settings):
            config = objective.ObjectiveConfig(
                vllm_importance_sampling_correction=is_on,
                vllm_importance_sampling_clip_max=cap,
                **settings,
            )
            loss, terms = objective.grpo_loss(
                logprobs,
                old,
                old + 0.3,
                advantages,
                mask,
                weights,
                config,
                sampling_logprobs=sampling,
            )
            (gradient,) = torch.autograd.grad(loss, logprobs)
            metrics = objective.objective_metrics(terms, advantages, mask, config)
            return terms, gradient, metrics

        name, cap = "importance_sampling_ratio", p10.inputs["C"]
        raw, _, metrics = evaluate(True, 1000.0)
        p10.close("raw_token_weights", raw[name] * mask)
        p10.close("mean_weight", metrics[f"sampling/{name}/mean"].value)
        close(metrics[f"sampling/{name}/share_truncated"].value, 0)
        truncated, gradient, metrics = evaluate(True, cap, beta=0)
        p10.close("token_truncate", truncated[name] * mask)
        p10.close("frac_tokens_truncated", metrics[f"sampling/{name}/share_truncated"].value)
        p10.differs("token_mask_icepop", truncated[name] * mask)
    close(metrics[f"sampling/{name}/min"].value, 0.904837, atol=1e-6)
    close(metrics[f"sampling/{name}/max"].value, 2)
    assert [metrics[f"sampling/{name}/{one}"][1:] for one in ("mean", "min", "max")] == [
        (5, "mean"),
        (1, "min"),
        (1, "max"),
    ]
    assert metrics[f"sampling/{name}/share_truncated"][1:] == (5, "mean")
    assert name not in metrics  # it is logged once
    # Ratio e^0.1 = 1.105171, A = 1 and -1, in no case clipped: the gradient of the plain loss is
    # -r A / 5 = -+0.221034 a token, and with the weights it is these times 1, 1.105171, 2 and
    # 0.904837, 2.
    plain, plain_gradient, logged = evaluate(False, beta=0)
    assert name not in plain and not any("importance_sampling" in one for one in logged)
    close(plain_gradient, [[-0.221034] * 3, [0.221034, 0.221034, 0]], atol=1e-6)
    close(gradient, [[-0.221034, -0.244281, -0.442068], [0.2, 0.442068, 0]], atol=1e-6)
    close(truncated["surrogate"][mask], [1.105171, 1.221403, 2.210342, -1, -2.210342], atol=1e-6)
    # k3 of log(pi_ref/pi) = 0.2: e^0.2 - 1.2 = 0.021403, gradient 1 - e^0.2 = -0.221403; weights
    # are 1/5 a token
    with_kl, kl_gradient, _ = evaluate(True, cap, beta=0.5)
    close(with_kl["kl"][mask], [0.021403] * 5, atol=1e-6)
    close((kl_gradient - gradient)[mask], [0.5 * -0.221403 / 5] * 5, atol=1e-6)
    assert truncated[name].requires_grad is False
    assert all(torch.isfinite(term).all() for term in truncated.values())


def test_p14_jaccard(case):
    with case("P14_jaccard") as p14:
        rows = [
            {name: [canonical_label(label) for label in row[name]] for name in ("pred", "gold")}
            for row in p14.inputs["rows"]
        ]
        p14.close(
            "rows.jaccard_both_empty_is_1", [jaccard(row["pred"], row["gold"]) for row in rows]
        )


def test_p17_learning_rate(case):
    with case("P17_cosine_warmup") as p17:
        schedule = {
            "warmup_steps": p17.inputs["warmup_steps"],
            "total_steps": p17.inputs["total_steps"],
        }
        for step in p17.inputs["steps"]:
            p17.close(f"multiplier.{step}", learning_rate_at(step, base=1.0, **schedule))
            p17.close(
                f"lr.{step}",
                learning_rate_at(step, base=p17.inputs["base_lr"], **schedule),
                rtol=p17.lr_rtol,
            )


def test_p22_groups_by_id(objective, case):
    with case("P22_group_order") as p22:
        advantages = objective.group_advantages(
            f64(p22.inputs["rewards"]), torch.tensor(p22.inputs["prompt_ids"])
        )
        p22.close("advantages_by_prompt_id", advantages)
        p22.differs("wrong_if_viewed_as_contiguous_groups", advantages)


def test_p23_gradient_clipping(case):
    with case("P23_grad_clip") as p23:
        parameters = [
            torch.nn.Parameter(torch.zeros(len(grad), dtype=torch.float64))
            for grad in p23.inputs["grads"]
        ]
        for parameter, grad in zip(parameters, p23.inputs["grads"], strict=True):
            parameter.grad = f64(grad)
        p23.close("total_norm", clip_gradients(parameters, p23.inputs["max_norm"]))
        p23.close("clipped", [parameter.grad.tolist() for parameter in parameters])
        p23.close("clip_coef", parameters[1].grad[0] / 12)


# Toy examples. Two completions of two tokens; the probabilities are chosen so that the ratios are
# round numbers:
#
#                         completion 1      completion 2
#     pi                   0.5    0.3        0.2    0.6
#     pi_old               0.4    0.3        0.25   0.4
#     pi_ref               0.5    0.6        0.1    0.6
#     r = pi/pi_old        1.25   1          0.8    1.5
#     clip(r, .85, 1.22)   1.22   1          0.85   1.22
#     pi_ref/pi            1      2          0.5    1
#
# Rewards 1 and 0 have the mean 0.5: A = +0.5 and -0.5.
PI, PI_OLD, PI_REF = (
    f64([[0.5, 0.3], [0.2, 0.6]]),
    f64([[0.4, 0.3], [0.25, 0.4]]),
    f64([[0.5, 0.6], [0.1, 0.6]]),
)
BOTH_TOKENS = torch.ones(2, 2, dtype=torch.bool)


def toy(objective, loss_type="dr_grpo", max_completion_length=10):
    """Compute (loss, terms, advantages, gradient) of the table above."""
    logprobs = PI.log().requires_grad_()
    advantages = objective.group_advantages(f64([1, 0]), torch.tensor([7, 7]))
    weights = weights_of(objective, BOTH_TOKENS, loss_type, max_completion_length)
    loss, terms = objective.grpo_loss(
        logprobs,
        PI_OLD.log(),
        PI_REF.log(),
        advantages,
        BOTH_TOKENS,
        weights,
        objective.ObjectiveConfig(),
    )
    loss.backward()
    return loss, terms, advantages, logprobs.grad


def test_toy_terms(objective):
    _, terms, advantages, _ = toy(objective)
    assert set(terms) == {
        "log_ratio",
        "ratio",
        "clipped_ratio",
        "surrogate",
        "kl",
        "per_token_loss",
    }
    close(advantages, [0.5, -0.5])
    close(terms["log_ratio"].exp(), [[1.25, 1], [0.8, 1.5]])
    close(terms["ratio"], [[1.25, 1], [0.8, 1.5]])
    close(terms["clipped_ratio"], [[1.22, 1], [0.85, 1.22]])
    # min(r A, clip(r) A): min(0.625, 0.61), 0.5; min(-0.4, -0.425), min(-0.75, -0.61)
    close(terms["surrogate"], [[0.61, 0.5], [-0.425, -0.75]])
    # k3 = x - ln(x) - 1 with x = pi_ref/pi: 0, 2 - ln 2 - 1 = 1 - ln 2; 0.5 + ln 2 - 1 = ln 2 -
    # 0.5, 0
    close(terms["kl"], [[0, 1 - math.log(2)], [math.log(2) - 0.5, 0]])
    # -surrogate + 0.15 kl: 0.15 (1 - 0.693147) = 0.046028 and 0.15 (0.693147 - 0.5) = 0.028972
    close(terms["per_token_loss"], [[-0.61, -0.453972], [0.453972, 0.75]], atol=1e-6)


def test_toy_loss_and_gradient(objective):
    # The four tokens sum to (-0.61 - 0.5 + 0.425 + 0.75) + 0.15 x 0.5 = 0.065 + 0.075 = 0.14;
    # dr_grpo: over 2 completions x 10.
    loss, _, _, gradient = toy(objective)
    close(loss, 0.14 / 20)
    # d/d logpi = -r A where the clip does not bind, 0 where it does, + 0.15 (1 - pi_ref/pi), and
    # all over 20: bound + 0, -0.5 - 0.15 = -0.65; bound + 0.075, 0.75 + 0
    close(gradient, [[0, -0.65 / 20], [0.075 / 20, 0.75 / 20]])
    # Eq. 2 to the letter divides by 2 completions x 2 tokens each; dapo by 4 tokens: the same here,
    # since the lengths are equal
    close(toy(objective, "grpo")[0], 0.14 / 4)
    close(toy(objective, "dapo")[0], 0.14 / 4)


def test_toy_metrics(objective):
    _, terms, advantages, _ = toy(objective)
    metrics = objective.objective_metrics(
        terms, advantages, BOTH_TOKENS, objective.ObjectiveConfig()
    )
    expected = {  # value, weight, reduction
        "kl": (0.5 / 4, 4, "mean"),
        "surrogate": (-0.065 / 4, 4, "mean"),
        "approx_kl_old": (-math.log(1.5) / 4, 4, "mean"),  # 1.25 x 1 x 0.8 x 1.5 = 1.5
        "ratio/mean": (4.55 / 4, 4, "mean"),
        "ratio/min": (0.8, 1, "min"),
        "ratio/max": (1.5, 1, "max"),
        # the 0.8; the 1.5 is outside too, but A < 0 and its gradient is kept
        "clip_ratio/low_mean": (1 / 4, 4, "mean"),
        "clip_ratio/low_min": (0, 1, "min"),  # completion 1 has none, completion 2 one of two
        "clip_ratio/high_mean": (1 / 4, 4, "mean"),  # the 1.25
        "clip_ratio/high_max": (1 / 2, 1, "max"),
        "clip_ratio/region_mean": (2 / 4, 4, "mean"),
    }
    assert set(metrics) == set(expected)
    for name, (value, weight, reduction) in expected.items():
        close(metrics[name].value, value)
        assert metrics[name][1:] == (weight, reduction), name


def test_clip_extremes_are_over_completions(objective):
    # Completion 1: ratios 0.5, 0.5, 0.86 with A < 0: 2/3 clipped low. Completion 2: 0.5 with A < 0:
    # all of it. Completion 3: 2, 1.21 with A > 0: half clipped high. So the least share clipped low
    # is completion 3's 0, and without it 2/3.
    ratio = f64([[0.5, 0.5, 0.86], [0.5, 9, 9], [2, 1.21, 9]])
    mask, advantages = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool(), f64([-1, -1, 1])
    config = objective.ObjectiveConfig(beta=0)
    _, terms = objective.grpo_loss(
        ratio.log(), torch.zeros(3, 3).double(), None, advantages, mask, mask.double(), config
    )
    metrics = objective.objective_metrics(terms, advantages, mask, config)
    close(metrics["clip_ratio/low_min"].value, 0)
    close(metrics["clip_ratio/high_max"].value, 1 / 2)
    close(metrics["clip_ratio/low_mean"].value, 3 / 6)
    first_two = objective.objective_metrics(
        {name: term[:2] for name, term in terms.items()}, advantages[:2], mask[:2], config
    )
    close(first_two["clip_ratio/low_min"].value, 2 / 3)  # in fp64, as the tensors are
    close(first_two["clip_ratio/high_max"].value, 0)


def test_a_forks_own_term_is_logged(objective):
    # The mean over the three real tokens, (1 + 2 + 6) / 3; what stands in the masked slot does not
    # count.
    mask, advantages = torch.tensor([[1, 1], [1, 0]]).bool(), f64([1, -1])
    config = objective.ObjectiveConfig(beta=0)
    _, terms = objective.grpo_loss(
        f64([[0, 0], [0, 0]]), f64([[0, 0], [0, 0]]), None, advantages, mask, mask.double(), config
    )
    metrics = objective.objective_metrics(
        terms | {"bonus": f64([[1, 2], [6, math.nan]])}, advantages, mask, config
    )
    assert "bonus" in metrics
    close(metrics["bonus"].value, 3)
    assert metrics["bonus"][1:] == (3, "mean")


def test_toy_uneven_lengths(objective):
    # Lengths 1 and 2. dr_grpo, constant 4: 1/(2 x 4) a token. grpo: 1/(2 x 1) and 1/(2 x 2). dapo:
    # 1/3.
    mask = torch.tensor([[1, 0], [1, 1]]).bool()
    close(weights_of(objective, mask, "dr_grpo", 4), [[1 / 8, 0], [1 / 8, 1 / 8]])
    close(weights_of(objective, mask, "grpo", 4), [[1 / 2, 0], [1 / 4, 1 / 4]])
    close(weights_of(objective, mask, "dapo", 4), [[1 / 3, 0], [1 / 3, 1 / 3]])
    # On policy, with A = 0.5 and -0.5, each token loses -A: -0.5 | 0.5, 0.5
    config, zeros = objective.ObjectiveConfig(beta=0), torch.zeros(2, 2).double()
    for loss_type, expected in {
        "dr_grpo": 0.5 / 8,
        "grpo": -0.5 / 2 + 1 / 4,
        "dapo": 0.5 / 3,
    }.items():
        weights = weights_of(objective, mask, loss_type, 4)
        loss, _ = objective.grpo_loss(zeros, zeros, None, f64([0.5, -0.5]), mask, weights, config)
        close(loss, expected)


def test_toy_advantages(objective):
    # Group 5: rewards 4 and 0, mean 2, A = +2, -2; std = sqrt((4 + 4)/(2 - 1)) = 2.828427.
    # Group 3: rewards 1 and 3, mean 2, A = -1, +1; std = sqrt((1 + 1)/1) = 1.414214.
    # All four: mean 2, std = sqrt((4 + 4 + 1 + 1)/(4 - 1)) = 1.825742. The divisor is the std +
    # 0.0001.
    rewards, group_ids = f64([4, 1, 0, 3]), torch.tensor([5, 3, 5, 3])
    close(objective.group_advantages(rewards, group_ids), [2, -1, -2, 1])
    close(
        objective.group_advantages(rewards, group_ids, "group"),
        [0.707082, -0.707057, -0.707082, 0.707057],
        atol=1e-6,
    )
    close(
        objective.group_advantages(rewards, group_ids, "batch"),
        [1.095385, -0.547693, -1.095385, 0.547693],
        atol=1e-6,
    )


def test_toy_hospitals(objective):
    # A = +-0.5, 0, 0 and +-0.25. Mean squares: 0.5 / 4 = 0.125 and 0.125 / 2 = 0.0625, of all
    # 0.625 / 6 = 0.1041667. Factors: sqrt(0.1041667 / 0.125) = 0.912871 and sqrt(0.1041667 /
    # 0.0625) = 1.290994. The sum of squares stays: 2 x 0.456435^2 + 2 x 0.322749^2 = 0.625.
    rewards = f64(HOSPITAL_REWARDS)
    by_hospital = objective.ObjectiveConfig(scale_by_hospital="rms")
    close(
        objective.group_advantages(
            rewards, HOSPITAL_GROUPS, config=by_hospital, hospitals=HOSPITALS
        ),
        [0.456435, -0.456435, 0, 0, 0.322749, -0.322749],
        atol=1e-6,
    )
    # each of the hospitals adds its completions' share to the sum: 4/6 and 2/6 of 0.625
    close(2 * 0.456435**2, 0.625 * 4 / 6, atol=1e-6)
    # a third one without spread keeps its zeros and takes nothing from the others
    close(
        objective.group_advantages(
            f64([*HOSPITAL_REWARDS, 0.3, 0.3]),
            torch.tensor([*HOSPITAL_GROUPS, 3, 3]),
            config=by_hospital,
            hospitals=torch.tensor([*HOSPITALS, 0, 0]),
        ),
        [0.456435, -0.456435, 0, 0, 0.322749, -0.322749, 0, 0],
        atol=1e-6,
    )
    # off is off
    close(
        objective.group_advantages(rewards, HOSPITAL_GROUPS, hospitals=HOSPITALS),
        [0.5, -0.5, 0, 0, 0.25, -0.25],
    )


def test_a_hospital_alone_is_scaled_by_nothing(objective):
    by_hospital = objective.ObjectiveConfig(scale_by_hospital="rms")
    rewards = f64([0.1, 0.7, 0.3, 0.3, 0.2, 0.9])
    for scale_rewards in ("none", "group", "batch"):
        plain = objective.group_advantages(rewards, HOSPITAL_GROUPS, scale_rewards)
        for hospitals in (None, torch.full((6,), 3)):
            alone = objective.group_advantages(
                rewards, HOSPITAL_GROUPS, scale_rewards, config=by_hospital, hospitals=hospitals
            )
            assert torch.equal(alone, plain)
    # nor is one beside a hospital without any spread, or without any reward
    for other in ([0.4, 0.4], [math.nan, math.nan], [math.nan, 0.4]):
        rewards = f64([0.1, 0.7, 0.3, 0.3, *other])
        scaled = objective.group_advantages(
            rewards, HOSPITAL_GROUPS, config=by_hospital, hospitals=HOSPITALS
        )
        assert torch.equal(scaled, objective.group_advantages(rewards, HOSPITAL_GROUPS))
        assert scaled[4:].tolist() == [0, 0]


def test_a_hospitals_completions_without_a_reward_do_not_count(objective):
    # hospital 4: A = +-0.5 of two completions with a reward, mean square 0.25; hospital 9: 0.0625;
    # both 0.625 / 4 = 0.15625. Factors: sqrt(0.625) = 0.790569 and sqrt(2.5) = 1.581139
    rewards = f64([1, 0, math.nan, math.nan, 0.5, 0])
    close(
        objective.group_advantages(
            rewards,
            HOSPITAL_GROUPS,
            config=objective.ObjectiveConfig(scale_by_hospital="rms"),
            hospitals=HOSPITALS,
        ),
        [0.395285, -0.395285, 0, 0, 0.395285, -0.395285],
        atol=1e-6,
    )


def test_a_single_spread_of_a_hospital_is_raised_within_the_bound(objective):
    # hospital 9 has one group that differs by 0.002 and seven settled ones: 16 completions
    groups = torch.arange(32) // 2
    rewards = f64([1, 0] * 8 + [0.002, 0] + [0] * 14)
    hospitals = (torch.arange(32) >= 16).long()
    scaled = objective.group_advantages(
        rewards,
        groups,
        config=objective.ObjectiveConfig(scale_by_hospital="rms"),
        hospitals=hospitals,
    )
    # m = (16 x 0.25 + 2e-6) / 32; the bound sqrt(16 m), here sqrt(8 m) since two share it
    common = (4 + 2e-6) / 32
    close(scaled[16], math.sqrt(8 * common), atol=1e-9)
    close(scaled.square().sum(), 4 + 2e-6)


def test_rewards_one_millionth_apart_say_nothing(objective):
    # Group 0 differs by exactly 1e-6, the most that counts as residue; group 1 by 2e-6, whose
    # halves are +-1e-6.
    close(
        objective.group_advantages(f64([0, 1e-6, 0, 2e-6]), torch.tensor([0, 0, 1, 1])),
        [0, 0, -1e-6, 1e-6],
        atol=1e-12,
    )


def test_one_rated_completion_gets_zero_without_a_warning(objective):
    with warnings.catch_warnings():
        # torch warns of a standard deviation of one value, and makes it NaN
        warnings.simplefilter("error")
        for scale_rewards in ("none", "group", "batch"):
            close(objective.group_advantages(f64([3.0]), torch.tensor([0]), scale_rewards), [0])


def test_one_token_in_the_whole_step(objective):
    # num_tokens 1, length 1, constant 1: the divisors' floors of 1 change nothing, so the only
    # token has weight 1.
    for loss_type in ("dr_grpo", "grpo", "dapo"):
        close(weights_of(objective, torch.ones(1, 1, dtype=torch.bool), loss_type), [[1]])


def test_without_beta_an_overflowing_estimate_is_logged_and_not_lost_on(objective):
    # pi_ref/pi = exp(1000) is infinite, and 0 x inf would be NaN. The surrogate is 1 x 2, so the
    # loss is -2.
    zeros, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, terms = objective.grpo_loss(
        zeros, zeros, zeros + 1000, f64([2]), mask, mask.double(), objective.ObjectiveConfig(beta=0)
    )
    close(loss, -2)
    assert terms["kl"].item() == math.inf


def test_a_token_is_clipped_only_where_its_gradient_is(objective):
    # (ratio, A): on the bounds themselves the gradient is kept; with A = 0 there is none to take;
    # 0.5 is clipped by A < 0 only and 2 by A > 0 only, however small A is. So one of eight is
    # clipped low, (0.5, -0.5), and one high, (2, 0.5).
    ratio = f64([[0.85], [1.22], [0.5], [2], [0.5], [2], [0.5], [2]])
    advantages = f64([-1, 1, 0, 0, 0.5, -0.5, -0.5, 0.5])
    terms = {"ratio": ratio, "kl": ratio, "surrogate": ratio, "log_ratio": ratio}
    mask = torch.ones(8, 1, dtype=torch.bool)
    metrics = objective.objective_metrics(terms, advantages, mask, objective.ObjectiveConfig())
    close(
        [metrics[f"clip_ratio/{name}"].value for name in ("low_mean", "high_mean", "region_mean")],
        [1 / 8, 1 / 8, 2 / 8],
    )


def test_metrics_carry_no_gradient(objective):
    logprobs, mask = torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    config = objective.ObjectiveConfig()
    _, terms = objective.grpo_loss(
        logprobs, logprobs.detach(), logprobs.detach(), torch.ones(1), mask, mask.float(), config
    )
    assert terms["ratio"].requires_grad
    assert not any(
        metric.value.requires_grad
        for metric in objective.objective_metrics(terms, torch.ones(1), mask, config).values()
    )


# What is refused, and what is only warned of


def test_config_names_every_field_out_of_range(objective):
    with pytest.raises(ValueError) as error:
        objective.ObjectiveConfig(epsilon_low=1.0, epsilon_high=-0.1, beta=math.nan)
    assert str(error.value).splitlines() == [
        "epsilon_low is 1.0; it must lie in [0, 1)",
        "epsilon_high is -0.1; it must lie in [0, inf)",
        "beta is nan; it must lie in [0, inf)",
    ]
    for name in ("epsilon_low", "epsilon_high", "beta"):
        for value in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"^{name} is {value};"):
                objective.ObjectiveConfig(**{name: value})
    with pytest.raises(ValueError) as error:
        objective.ObjectiveConfig(
            kl_estimator="k4", loss_type="ppo", scale_rewards="std", beta=-1.0
        )
    assert str(error.value).splitlines() == [
        "kl_estimator is 'k4'; use one of k1, k2, k3",
        "loss_type is 'ppo'; use one of dr_grpo, grpo, dapo",
        "scale_rewards is 'std'; use one of none, group, batch",
        "beta is -1.0; it must lie in [0, inf)",
    ]


def test_zero_is_in_every_range_and_a_config_does_not_change(objective):
    config = objective.ObjectiveConfig(epsilon_low=0, epsilon_high=0, beta=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0


def test_every_field_documents_itself(objective):
    """What run_grpo.py makes flags and help texts of. A fork's own fields may have units too."""
    metadata = {
        field.name: field.metadata for field in dataclasses.fields(objective.ObjectiveConfig)
    }
    assert all(entry["help"] and entry["source"] for entry in metadata.values())
    ours = {name: metadata[name] for name in FIELDS}
    assert {name: entry["within"] for name, entry in ours.items() if "within" in entry} == {
        "epsilon_low": "[0, 1)",
        "epsilon_high": "[0, inf)",
        "beta": "[0, inf)",
    }
    assert {name: entry["unit"] for name, entry in ours.items() if "unit" in entry} == {
        "beta": "reward per nat"
    }


def test_defaults_are_the_papers(objective):
    config = objective.ObjectiveConfig()
    assert (config.epsilon_low, config.epsilon_high, config.beta) == (0.15, 0.22, 0.15)
    assert (config.kl_estimator, config.loss_type, config.scale_rewards) == (
        "k3",
        "dr_grpo",
        "none",
    )
    # off, unlike TRL's
    assert config.vllm_importance_sampling_correction is False
    assert config.vllm_importance_sampling_clip_max == 2


def test_a_cap_without_the_correction_is_warned_of(objective):
    cap, correction = "vllm_importance_sampling_clip_max", "vllm_importance_sampling_correction"
    [line] = objective.ObjectiveConfig(**{cap: 3.0}).warnings()
    assert line == f"{cap} has no effect without --{correction}"
    assert objective.ObjectiveConfig(**{cap: 3.0, correction: True}).warnings() == []
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^{cap} is {value}; it must lie in"):
            objective.ObjectiveConfig(**{cap: value})


def test_only_k1_in_the_loss_is_warned_of(objective):
    assert "k1" in objective.ObjectiveConfig(kl_estimator="k1").warnings()[0]
    assert objective.ObjectiveConfig(kl_estimator="k1", beta=0).warnings() == []
    assert (
        objective.ObjectiveConfig(kl_estimator="k2").warnings()
        == objective.ObjectiveConfig().warnings()
        == []
    )


def test_unknown_names_and_a_missing_reference_are_refused(objective):
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="kl_estimator is 'k4'"):
        objective.kl_estimate(zeros, zeros, "k4")
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        weights_of(objective, mask, "ppo")
    with pytest.raises(ValueError, match="scale_rewards is 'std'"):
        objective.group_advantages(f64([0, 1]), torch.tensor([0, 0]), "std")
    with pytest.raises(ValueError, match="ref_logprobs"):
        objective.grpo_loss(zeros, zeros, None, zeros[0], mask, zeros, objective.ObjectiveConfig())
    config = objective.ObjectiveConfig(vllm_importance_sampling_correction=True)
    with pytest.raises(ValueError, match="correction needs sampling_logprobs"):
        objective.grpo_loss(zeros, zeros, zeros, zeros[0], mask, zeros, config)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "mask", "weights"])
def test_a_tensor_of_another_shape_is_refused(objective, name):
    """It would broadcast, and the loss be a number all the same."""
    arguments = {
        "old_logprobs": torch.zeros(2, 3),
        "ref_logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "weights": torch.ones(2, 3),
    }
    config = objective.ObjectiveConfig()
    with pytest.raises(
        ValueError, match=rf"^{name} has shape \(1, 3\), logprobs \(2, 3\); all are \[N,T\]$"
    ):
        objective.grpo_loss(
            torch.zeros(2, 3), **arguments | {name: arguments[name][:1]}, config=config
        )
    with pytest.raises(
        ValueError,
        match=r"^advantages has shape \(2, 1\); one number a completion is needed, \[2\]$",
    ):
        objective.grpo_loss(
            torch.zeros(2, 3), **arguments | {"advantages": torch.zeros(2, 1)}, config=config
        )


# The worked cases are used up


@functools.cache
def opened_keys() -> dict[str, set[str]]:
    """Read the keys of each case that some test opens from the source of all tests.

    An empty key stands for the whole case.
    """
    opened: dict[str, set[str]] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "case"
            ):
                assert node.args and all(
                    isinstance(argument, ast.Constant) for argument in node.args
                ), f"{file.name}:{node.lineno}: write the id and the keys of a case as literals"
                case_id, *keys = [argument.value for argument in node.args]
                opened.setdefault(case_id, set()).update(keys or [""])
    return opened


@pytest.mark.parametrize("case_id", CASES)
def test_every_expected_value_is_opened_or_listed(case_id):
    keys = opened_keys().get(case_id, set())
    forgotten = [
        leaf
        for leaf in leaves(CASES[case_id]["expected"])
        if not any(key == "" or covers(key, leaf) for key in keys)
        and not any(covers(listed, f"{case_id}.{leaf}") for listed in NOT_IN_THE_PRODUCT)
    ]
    assert not forgotten, (
        f"no test opens {forgotten} of {case_id}, and NOT_IN_THE_PRODUCT does not list them"
    )


def test_the_list_has_no_stale_entry():
    existing = [
        f"{case_id}.{leaf}"
        for case_id, entry in CASES.items()
        for leaf in leaves(entry["expected"])
    ]
    assert [
        key for key in NOT_IN_THE_PRODUCT if not any(covers(key, leaf) for leaf in existing)
    ] == []
    assert all(NOT_IN_THE_PRODUCT.values())
    assert len(CASES) == 24


def test_a_forgotten_or_wrong_value_fails():
    with (
        pytest.raises(
            AssertionError,
            match="neither compared nor listed as not ours: .*'clipped', 'total_norm'",
        ),
        open_case("P23_grad_clip") as p23,
    ):
        p23.close("clip_coef", 0.076923)
    with open_case("P23_grad_clip", "clipped") as p23:  # a part
        with pytest.raises(AssertionError, match="another shape"):
            p23.close("clipped", [[0.230769, 0.307692]])
        with pytest.raises(AssertionError, match=r"clipped\[1\]\[0\]: 0.9231"):
            p23.close("clipped", [[0.230769, 0.307692], [0.9231]])
        with pytest.raises(AssertionError, match=r"clipped\[0\]\[1\]: nan"):
            p23.close("clipped", [[0.230769, math.nan], [0.923077]])
        p23.close("clipped", [[0.230769, 0.307692], [0.923077]])
    with open_case("P22_group_order") as p22:
        wrong = p22.expected["wrong_if_viewed_as_contiguous_groups"]
        with pytest.raises(AssertionError, match="came out"):
            p22.differs("wrong_if_viewed_as_contiguous_groups", wrong)
        with pytest.raises(AssertionError, match="is listed"):
            p22.close("wrong_if_viewed_as_contiguous_groups", wrong)
        p22.close("advantages_by_prompt_id", p22.expected["advantages_by_prompt_id"])
