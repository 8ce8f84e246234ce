"""Protect the checks of the objective: they see a mistake where there is one.

Each break of rl/objective.py below must fail one of them.

When a fork edits a line that a break replaces, the test says so: adapt the break to the new line.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import rl.objective
from tests.helpers.patches import module_of

SOURCE = Path(rl.objective.__file__).read_text(encoding="utf-8")


def run_all(checks, objective) -> None:
    """Run all checks on a module. AssertionError from the first that fails."""
    for check in checks.values():
        check(objective)


CONTIGUOUS = (
    "(torch.arange(len(group_ids)) // (len(group_ids) // len(group_ids.unique())) == group)"
)

# name: (what stands in rl/objective.py, exactly once; what stands there instead)
BREAKS = {
    # advantages
    "advantage not centred": (
        "centred = group_rewards - group_rewards.mean()",
        "centred = group_rewards",
    ),
    "centred over the rollout": (
        "group_rewards - group_rewards.mean()",
        "group_rewards - rewards[rated].mean()",
    ),
    "groups by memory layout": ("(group_ids == group)", CONTIGUOUS),
    "population standard deviation": ("values.std() if", "values.std(unbiased=False) if"),
    "standard deviation without epsilon": ("STD_EPSILON = 1e-4", "STD_EPSILON = 0"),
    "std of the group for the rollout's": (
        "(rollout_std + STD_EPSILON)",
        "(_std(group_rewards) + STD_EPSILON)",
    ),
    "std of the rollout for the group's": (
        "(_std(group_rewards) + STD_EPSILON)",
        "(rollout_std + STD_EPSILON)",
    ),
    "scaled by default": ('scale_rewards: str = "none"', 'scale_rewards: str = "group"'),
    "residue taken for a preference": (
        "group_rewards.min() <= ZERO_VARIANCE",
        "group_rewards.min() <= 0",
    ),
    "NaN rewards not left out": (
        "rated = ~torch.isnan(rewards)",
        "rated = torch.ones_like(rewards, dtype=torch.bool)",
    ),
    "NaN rewards counted as zero": (
        "rated = ~torch.isnan(rewards)",
        "rewards = rewards.nan_to_num(); rated = rewards == rewards",
    ),
    "every hospital's mean square, settled ones too": (
        "torch.stack(with_spread).any(0)",
        "rated",
    ),
    "a hospital's mean square without its settled groups": (
        "advantages[members].square().mean()).sqrt()",
        "advantages[members & (advantages != 0)].square().mean()).sqrt()",
    ),
    "a hospital's sum of squares for its mean": (
        "advantages[members].square().mean()).sqrt()",
        "advantages[members].square().sum()).sqrt()",
    ),
    "completions without a reward count in a hospital": (
        "members := (hospitals == hospital) & rated",
        "members := hospitals == hospital",
    ),
    "hospitals scaled without being asked": (
        'if config.scale_by_hospital == "rms" and hospitals',
        "if hospitals",
    ),
    # ratio, clip and surrogate
    "surrogate with the wrong sign": (
        "= -surrogate + config.beta * kl",
        "= surrogate + config.beta * kl",
    ),
    "epsilon_low and epsilon_high swapped": (
        "ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)",
        "ratio.clamp(1 - config.epsilon_high, 1 + config.epsilon_low)",
    ),
    "symmetric clip": ("1 + config.epsilon_high)  #", "1 + config.epsilon_low)  #"),
    "interval itself as the bounds": (
        "ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)",
        "ratio.clamp(config.epsilon_low, config.epsilon_high)",
    ),
    "maximum for minimum": ("torch.minimum(ratio", "torch.maximum(ratio"),
    "always clipped": (
        "torch.minimum(ratio * advantage, clipped_ratio * advantage)",
        "clipped_ratio * advantage",
    ),
    "never clipped": (
        "torch.minimum(ratio * advantage, clipped_ratio * advantage)",
        "ratio * advantage",
    ),
    "ratio to the reference": (
        "log_ratio = logprobs - old_logprobs",
        "log_ratio = logprobs - (old_logprobs if ref_logprobs is None else ref_logprobs)",
    ),
    "ratio upside down": (
        "log_ratio = logprobs - old_logprobs",
        "log_ratio = old_logprobs - logprobs",
    ),
    "ratio without gradient": (
        "ratio = log_ratio.exp()",
        "ratio = log_ratio.detach().exp() + 0 * log_ratio",
    ),
    "log-ratio for the ratio": ("ratio = log_ratio.exp()", "ratio = 1 + log_ratio"),
    # KL
    "KL with the wrong sign": (
        "= -surrogate + config.beta * kl",
        "= -surrogate - config.beta * kl",
    ),
    "KL without beta": ("= -surrogate + config.beta * kl", "= -surrogate + kl"),
    "no KL": ("= -surrogate + config.beta * kl", "= -surrogate"),
    "KL times the advantage": ("config.beta * kl", "config.beta * kl * advantage"),
    "KL to the old policy": (
        "kl_estimate(logprobs, ref_logprobs,",
        "kl_estimate(logprobs, old_logprobs,",
    ),
    "KL without gradient": (
        "kl_estimate(logprobs, ref_logprobs,",
        "kl_estimate(logprobs.detach(), ref_logprobs,",
    ),
    "estimator ignored": ("ref_logprobs, config.kl_estimator)", "ref_logprobs)"),
    "policies swapped": (
        "log_ref_ratio = ref_logprobs - logprobs",
        "log_ref_ratio = logprobs - ref_logprobs",
    ),
    "policies swapped in k3": (
        "torch.expm1(log_ref_ratio) - log_ref_ratio",
        "torch.expm1(-log_ref_ratio) + log_ref_ratio",
    ),
    "k3 without the -1": ("torch.expm1(log_ref_ratio)", "torch.exp(log_ref_ratio)"),
    "k3 with a rounding error": ("torch.expm1(log_ref_ratio) -", "torch.exp(log_ref_ratio) - 1 -"),
    "k2 without the half": ("log_ref_ratio.square() / 2", "log_ref_ratio.square()"),
    "k1 with the wrong sign": ("return -log_ref_ratio", "return log_ref_ratio"),
    # the sampler
    "corrected without being asked": (
        "is not None and config.vllm_importance_sampling_correction:\n        mismatch",
        "is not None:\n        mismatch",
    ),
    "pi_old and sampler swapped": (
        "old_logprobs - sampling_logprobs, zero",
        "sampling_logprobs - old_logprobs, zero",
    ),
    "the policy's weight for pi_old's": (
        "old_logprobs - sampling_logprobs, zero",
        "logprobs - sampling_logprobs, zero",
    ),
    "weights not truncated": (".clamp(max=config.vllm_importance_sampling_clip_max)", ""),
    "weights truncated below": (
        ".clamp(max=config.vllm_importance_sampling_clip_max)",
        ".clamp(1, config.vllm_importance_sampling_clip_max)",
    ),
    "weights that weigh nothing": ("surrogate = weight * surrogate", "surrogate = surrogate"),
    "the KL weighed as well": (
        "surrogate = weight * surrogate",
        "surrogate, kl = weight * surrogate, weight * kl",
    ),
    "NaN in masked log-probabilities of the sampler": (
        "torch.where(mask, old_logprobs - sampling_logprobs, zero)",
        "old_logprobs - sampling_logprobs",
    ),
    "a cut weight not counted": ("token_mean(weight >= cap)", "token_mean(weight > cap)"),
    # mask
    "NaN in masked log-probabilities": ("torch.where(mask, logprobs, zero)", "logprobs"),
    "NaN in masked old log-probabilities": (
        "torch.where(mask, old_logprobs, zero)",
        "old_logprobs",
    ),
    "NaN in masked reference log-probabilities": (
        "else torch.where(mask, ref_logprobs, zero)",
        "else ref_logprobs",
    ),
    "mask multiplied, not selected": ("torch.where(mask, logprobs, zero)", "logprobs * mask"),
    "loss in masked slots": ("torch.where(mask, per_token_loss, zero)", "per_token_loss"),
    "weights in masked slots": (
        "tokens = mask.to(dtype)",
        "tokens = torch.ones_like(mask, dtype=dtype)",
    ),
    # weights
    "mean for sum": ("(weights * per_token_loss).sum()", "(weights * per_token_loss).mean()"),
    "weights left out": ("(weights * per_token_loss).sum()", "per_token_loss.sum()"),
    "dr_grpo over the micro-batch": (
        "tokens / (num_completions * max_completion_length)",
        "tokens / (len(mask) * max_completion_length)",
    ),
    "dr_grpo without the completions": (
        "tokens / (num_completions * max_completion_length)",
        "tokens / max_completion_length",
    ),
    "dr_grpo over the padded width": (
        "tokens / (num_completions * max_completion_length)",
        "tokens / (num_completions * mask.shape[1])",
    ),
    "dr_grpo over the length": (
        "tokens / (num_completions * max_completion_length)",
        "tokens / (num_completions * tokens.sum(1, keepdim=True).clamp(min=1))",
    ),
    "grpo over the micro-batch": (
        "tokens / (num_completions * lengths)",
        "tokens / (len(mask) * lengths)",
    ),
    "grpo over the padded width": (
        "tokens / (num_completions * lengths)",
        "tokens / (num_completions * mask.shape[1])",
    ),
    "grpo without a floor for the length": (
        ".sum(1, keepdim=True).clamp(min=1)",
        ".sum(1, keepdim=True)",
    ),
    "dapo over the micro-batch": (
        "tokens / max(num_tokens, 1)",
        "tokens / tokens.sum().clamp(min=1)",
    ),
    "dapo without a floor for the tokens": ("tokens / max(num_tokens, 1)", "tokens / num_tokens"),
    # metrics
    "low clip not gated by the sign": (
        "1 - config.epsilon_low) & negative & mask",
        "1 - config.epsilon_low) & mask",
    ),
    "high clip not gated by the sign": (
        "1 + config.epsilon_high) & positive & mask",
        "1 + config.epsilon_high) & mask",
    ),
    "masked tokens clipped low": ("& negative & mask", "& negative"),
    "masked tokens clipped high": ("& positive & mask", "& positive"),
    "low clip counted from the wrong bound": (
        '["ratio"] < 1 - config.epsilon_low',
        '["ratio"] < 1 - config.epsilon_high',
    ),
    "high clip counted from the wrong bound": (
        '["ratio"] > 1 + config.epsilon_high',
        '["ratio"] > 1 + config.epsilon_low',
    ),
    "logged surrogate with the wrong sign": (
        '"surrogate": token_mean(terms["surrogate"])',
        '"surrogate": token_mean(-terms["surrogate"])',
    ),
    "approximate KL with the wrong sign": (
        'token_mean(-terms["log_ratio"])',
        'token_mean(terms["log_ratio"])',
    ),
    "metrics over masked slots": (
        "values[mask].to(advantages.dtype)",
        "values.to(advantages.dtype)",
    ),
    "micro-batches weighted alike": (".mean(), num_tokens,", ".mean(), 1,"),
    "completions without tokens in the extremes": (
        "rows = mask.any(1)",
        "rows = mask.any(1) | True",
    ),
    "greatest for least share": (
        "(clipped_low.sum(1)[rows] / lengths).min()",
        "(clipped_low.sum(1)[rows] / lengths).max()",
    ),
    "least for greatest share": (
        "(clipped_high.sum(1)[rows] / lengths).max()",
        "(clipped_high.sum(1)[rows] / lengths).min()",
    ),
    "a minimum combined as a mean": (
        'Metric(ratio.min(), 1, "min")',
        'Metric(ratio.min(), 1, "mean")',
    ),
    "a fork's term not logged": ("return metrics | {\n", "return metrics or {\n"),
    # defaults
    "another beta": (
        "beta: float = field(\n        default=0.15,",
        "beta: float = field(\n        default=0.04,",
    ),
}


def test_the_unbroken_copy_passes(checks, monkeypatch):
    run_all(checks, module_of(SOURCE, monkeypatch))


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_seen(name, checks, monkeypatch):
    old, new = BREAKS[name]
    assert SOURCE.count(old) == 1, (
        f"the break replaces {old!r}, which must stand once in rl/objective.py: adapt this break"
    )
    broken = module_of(SOURCE.replace(old, new), monkeypatch)
    # any other exception means that the break itself is broken, and shows
    with contextlib.suppress(AssertionError):
        run_all(checks, broken)
        pytest.fail(f"{name!r} passes every check of the battery")
