"""Compute Eq. 2 of ChexReason (arXiv 2512.23090): the one file that a fork of the objective edits.

For one image x, G completions t_1..t_G are sampled from pi_old, the policy at the rollout, and

    J = 1/G sum_i 1/|t_i| sum_j [ min( r_ij A_i, clip(r_ij, 1 - eps_low, 1 + eps_high) A_i )
                                  - beta KL_ij ]

        r_ij  = pi(t_ij | x, t_i<j) / pi_old(t_ij | x, t_i<j)    importance ratio of a token
        A_i   = R_i - mean(R of the group)                       advantage of a completion
        KL_ij = pi_ref/pi - log(pi_ref/pi) - 1                   k3 estimate of KL(pi || pi_ref),
                                                                 pi_ref: the frozen SFT adapter

The loss is -J. It departs from vanilla GRPO (DeepSeekMath, arXiv 2402.03300) in five places, each
marked by its number below:

    (1) Clipping is asymmetric: eps_low 0.15 and eps_high 0.22 hold the ratio in [0.85, 1.22].
    (2) The advantage is centred but not divided by the group's standard deviation (`scale_rewards`,
        from Dr. GRPO, arXiv 2503.20783).
    (3) 1/|t_i| is replaced by the constant 1/max_completion_length (`loss_type`, from Dr. GRPO).
        The paper prints Eq. 2 with 1/|t_i| and says Dr. GRPO in the text. The default follows the
        text. "grpo" is Eq. 2 to the letter, and "dapo" weighs all tokens alike.
    (4) The k3 KL to the SFT adapter stays in the loss, with beta 0.15 (Dr. GRPO drops it).
    (5) Log-probabilities of pi, pi_old and pi_ref are at the sampling temperature, without the
        top-p truncation. The caller computes them.

The sampler is another program than the forward that gives log pi_old, above all where it is a
server. On request the min(...) of a token is weighed by how far the two are apart:

    w_ij = min( pi_old(t_ij | x, t_i<j) / sampler(t_ij | x, t_i<j), C )   truncated importance
                                                                          sampling, without gradient

The loss is a plain sum over tokens. Its weights are made from totals of the whole optimizer step,
so micro-batches add up to exactly the full batch, however it is cut.

Shapes: N completions, T completion tokens (padded). A row of [N,T] is one whole completion, and the
G completions of a group may lie in different micro-batches. `mask` [N,T] bool is true on the tokens
of the completion, stop token included. Slots outside it may hold anything, NaN included, and change
nothing. Everything is computed in the dtype of `logprobs` (fp32 in training).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

# Rewards of a group that differ by no more than this are floating-point residue, not a preference.
ZERO_VARIANCE = 1e-6
STD_EPSILON = 1e-4  # added to the standard deviation, as TRL does
# Terms of this file, which `objective_metrics` covers or whose mean is not worth a curve. Any other
# term, which a fork adds, is logged by itself.
KNOWN_TERMS = {
    *("log_ratio", "ratio", "clipped_ratio", "importance_sampling_ratio"),
    *("surrogate", "kl", "per_token_loss"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Hold the hyperparameters of Eq. 2.

    Each field is a flag of run_grpo.py. A new field becomes one by itself (rl/README.md says how).

    Raises ValueError naming every field that is out of range.
    """

    epsilon_low: float = field(
        default=0.15,
        metadata={
            "help": "lower clip: the ratio is held above 1 - epsilon_low",
            "source": "paper 3.2.2",
            "within": "[0, 1)",
        },
    )
    epsilon_high: float = field(
        default=0.22,
        metadata={
            "help": "upper clip: the ratio is held below 1 + epsilon_high",
            "source": "paper 3.2.2",
            "within": "[0, inf)",
        },
    )
    # the KL term
    beta: float = field(
        default=0.15,
        metadata={
            "help": "weight of the KL term against the reference, the frozen SFT adapter",
            "unit": "reward per nat",
            "source": "paper 3.2.2",
            "within": "[0, inf)",
        },
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k3",
        metadata={
            "help": (
                "per-token KL estimate in the loss; k1 has the right value but a zero-mean"
                " gradient, so it does not regularise"
            ),
            "source": "not published; k3 as in DeepSeekMath",
        },
    )
    # what separates the sampler from pi_old, under TRL's names
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": (
                "weigh the policy term of each token by pi_old / sampler, at most"
                " --vllm_importance_sampling_clip_max; with --use_vllm or without"
            ),
            "source": "TIS, Yao et al. 2025; not published; TRL's is on",
        },
    )
    vllm_importance_sampling_mode: Literal["token_truncate"] = field(
        default="token_truncate",
        metadata={
            "help": "how: a weight a token, cut above; TRL's other modes are no part of this",
            "source": "TIS; TRL's is sequence_mask",
        },
    )
    vllm_importance_sampling_clip_max: float = field(
        default=2.0,
        metadata={
            "help": "C, the largest weight of --vllm_importance_sampling_correction",
            "source": "TIS; TRL's is 3",
            "within": "(0, inf)",
        },
    )
    loss_type: Literal["dr_grpo", "grpo", "dapo"] = field(
        default="dr_grpo",
        metadata={
            "help": (
                "what normalises a token: the constant max_completion_length, the length of its"
                " completion (Eq. 2 to the letter), or all tokens of the optimizer step"
            ),
            "source": "paper 3.2.2, text",
        },
    )
    scale_by_hospital: Literal["none", "rms"] = field(
        default="none",
        metadata={
            "help": (
                "of several hospitals in --train_file: divide the advantages of each by their root"
                " mean square over the rollout, so that the weights alone say how much it counts"
            ),
            "source": "not published",
        },
    )
    scale_rewards: Literal["none", "group", "batch"] = field(
        default="none",
        metadata={
            "help": (
                "what divides the centred reward: nothing, the group's standard deviation, or that"
                " of the whole rollout"
            ),
            "source": "paper 3.2.2 says Dr. GRPO only",
        },
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; use one of {', '.join(get_args(choices))}"
            for name, choices in get_type_hints(type(self)).items()
            if get_origin(choices) is Literal and getattr(self, name) not in get_args(choices)
        ]
        if not 0 < (cap := self.vllm_importance_sampling_clip_max) < math.inf:
            problems.append(f"vllm_importance_sampling_clip_max is {cap}; it must lie in (0, inf)")
        if not 0 <= self.epsilon_low < 1:
            problems.append(f"epsilon_low is {self.epsilon_low}; it must lie in [0, 1)")
        if not 0 <= self.epsilon_high < math.inf:
            problems.append(f"epsilon_high is {self.epsilon_high}; it must lie in [0, inf)")
        if not 0 <= self.beta < math.inf:
            problems.append(f"beta is {self.beta}; it must lie in [0, inf)")
        if problems:
            raise ValueError("\n".join(problems))

    def warnings(self) -> list[str]:
        """List settings that are allowed but do not do what their name promises, one line each."""
        found = []
        if self.kl_estimator == "k1" and self.beta > 0:
            found.append(
                "kl_estimator k1 in the loss does not regularise: its gradient has mean zero. Use"
                " k2 or k3."
            )
        is_on, cap = self.vllm_importance_sampling_correction, "vllm_importance_sampling_clip_max"
        if not is_on and getattr(self, cap) != getattr(type(self), cap):
            found.append(f"{cap} has no effect without --vllm_importance_sampling_correction")
        return found


class Metric(NamedTuple):
    """Hold a number to log, and say how the values of several micro-batches combine.

    They combine to a mean weighted by `weight`, a min, a max or a sum.
    """

    value: Tensor
    weight: float
    reduction: Literal["mean", "min", "max", "sum"]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    scale_rewards: str = "none",
    *,
    kl: Tensor | None = None,
    config: ObjectiveConfig = ObjectiveConfig(),
    hospitals: Tensor | None = None,
) -> Tensor:
    """Compute A_i: how much better a completion is than the others of its group.

    rewards [N] float: of all completions of the rollout
    group_ids [N] int: the same number for completions of one prompt, in any order
    scale_rewards: what divides the centred reward, see ObjectiveConfig
    kl [N]: log pi_old - log pi_ref, summed over each completion's tokens. 0 at beta 0.
    config: its `scale_by_hospital` is read here.
    hospitals [N] int: the same number for completions of one hospital. None where there is one.
    Returns [N] of the rewards' dtype.

    A NaN reward is left out of its group's mean and gets 0. A group whose rewards differ by at most
    1e-6 gets exactly 0 in every mode. The KL term of its loss still acts. The training loop always
    passes `kl`, which is not used here, and all of `config`. They are there for forks (KL in the
    reward, or another baseline).
    """
    advantages = torch.zeros_like(rewards)  # [N]
    rated = ~torch.isnan(rewards)  # [N]
    rollout_std = _std(rewards[rated])
    for group in group_ids.unique():
        members = (group_ids == group) & rated  # [N]
        group_rewards = rewards[members]  # [<=G]
        if len(group_rewards) == 0 or group_rewards.max() - group_rewards.min() <= ZERO_VARIANCE:
            continue
        centred = group_rewards - group_rewards.mean()
        if scale_rewards == "none":  # (2)
            advantages[members] = centred
        elif scale_rewards == "group":
            advantages[members] = centred / (_std(group_rewards) + STD_EPSILON)
        elif scale_rewards == "batch":
            advantages[members] = centred / (rollout_std + STD_EPSILON)
        else:
            raise ValueError(f"scale_rewards is {scale_rewards!r}; use none, group or batch")
    if config.scale_by_hospital == "rms" and hospitals is not None:
        advantages = _scaled_by_hospital(advantages, hospitals, rated)
    return advantages


def _scaled_by_hospital(advantages: Tensor, hospitals: Tensor, rated: Tensor) -> Tensor:
    """Give each hospital the same mean square of A, so that none drowns another.

    With score vectors of like size that do not correlate, hospital h adds sum_{i in h} A_i^2 =
    n_h m_h to the expected square of the policy gradient: n_h completions, m_h = mean of A_i^2. A
    hospital with larger spreads, or with fewer settled groups (A = 0), so takes more than its share
    n_h, which --train_file gave it. Here

        A_i <- A_i sqrt(m / m_h)        m = sum of A_i^2 over all / sum of n_h over all with m_h > 0

    so that each adds n_h m, and the sum over all of A_i^2, hence the step, is what it was. A
    hospital without any spread (m_h = 0) keeps its zeros, and its n_h does not count. Where one
    alone has spreads m = m_h and nothing changes. |A_i| is at most sqrt(n_h m) afterwards: a
    hospital with a single small spread in the rollout is raised, but within this bound.

    advantages [N]: centred within groups, so that scaling keeps each group's mean at 0
    hospitals [N] int. rated [N] bool: completions that have a reward.
    Returns [N] of the advantages' dtype.
    """
    with_spread = [
        members
        for hospital in hospitals.unique()
        if advantages[members := (hospitals == hospital) & rated].any()
    ]  # [N] bool each
    if len(with_spread) < 2:
        return advantages
    together = torch.stack(with_spread).any(0)  # [N]
    common = advantages[together].square().mean()  # m
    scaled = advantages.clone()
    for members in with_spread:
        scaled[members] *= (common / advantages[members].square().mean()).sqrt()
    return scaled


def _std(values: Tensor) -> Tensor:
    """Compute the sample standard deviation (ddof 1), 0 for fewer than two values."""
    return values.std() if len(values) > 1 else values.new_zeros(())


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL_ij for each token [N,T] by Schulman's estimators, from tokens sampled from pi.

    k1 is unbiased in value, but its expected gradient is zero. k2 is biased in value, but its
    expected gradient is that of KL(pi || pi_ref). k3, as in GRPO, is unbiased and never negative.
    """
    log_ref_ratio = ref_logprobs - logprobs  # [N,T] log(pi_ref / pi)
    if estimator == "k1":
        return -log_ref_ratio
    if estimator == "k2":
        return log_ref_ratio.square() / 2
    if estimator == "k3":  # (4)
        # expm1: exact where the policies nearly agree
        return torch.expm1(log_ref_ratio) - log_ref_ratio
    raise ValueError(f"kl_estimator is {estimator!r}; use k1, k2 or k3")


def token_weights(
    mask: Tensor,
    loss_type: str,
    *,
    num_completions: int,
    num_tokens: int,
    max_completion_length: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute each token's weight in the loss of its optimizer step, so that micro-batches add up.

    mask [N,T] bool
    num_completions, num_tokens: totals of the WHOLE optimizer step (all micro-batches, all ranks),
        never of this micro-batch. So the losses and gradients of micro-batches add up to those of
        the full batch.
    Returns [N,T] of `dtype`, 0 where `mask` is false.
    """
    tokens = mask.to(dtype)  # [N,T]
    if loss_type == "dr_grpo":  # (3)
        return tokens / (num_completions * max_completion_length)
    if loss_type == "grpo":
        lengths = tokens.sum(1, keepdim=True).clamp(min=1)  # [N,1] |t_i|
        return tokens / (num_completions * lengths)
    if loss_type == "dapo":
        return tokens / max(num_tokens, 1)
    raise ValueError(f"loss_type is {loss_type!r}; use dr_grpo, grpo or dapo")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    config: ObjectiveConfig,
    *,
    sampling_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute -J on one micro-batch, as a pure sum, and every term of it.

    logprobs [N,T]: log pi of the sampled tokens, with gradient
    old_logprobs, ref_logprobs [N,T]: the same tokens under pi_old and pi_ref, without gradient.
        ref_logprobs may be None at beta 0.
    advantages [N]
    mask [N,T] bool
    weights [N,T]: from `token_weights`
    sampling_logprobs [N,T]: what the sampler recorded. Needed for importance sampling alone.
    entropy [N,T]: of pi, with gradient
    Returns (loss, terms): loss is a scalar, terms has the [N,T] tensors log_ratio, ratio,
    clipped_ratio, surrogate, kl, per_token_loss, and importance_sampling_ratio with the correction.

    The training loop always passes `sampling_logprobs` and `entropy`. The latter is not used here.
    It is there for forks (entropy bonus).
    """
    if ref_logprobs is None and config.beta > 0:
        raise ValueError(
            f"beta is {config.beta}, so ref_logprobs is needed: the log-probabilities under the"
            " frozen SFT adapter"
        )
    if sampling_logprobs is None and config.vllm_importance_sampling_correction:
        raise ValueError(
            "vllm_importance_sampling_correction needs sampling_logprobs: the log-probabilities"
            " that the sampler recorded"
        )
    for name, tensor in {
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "sampling_logprobs": sampling_logprobs,
        "mask": mask,
        "weights": weights,
    }.items():
        if tensor is not None and tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}; all are"
                " [N,T]"
            )
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; one number a completion is needed,"
            f" [{len(logprobs)}]"
        )
    zero = logprobs.new_zeros(())
    logprobs = torch.where(mask, logprobs, zero)  # selected, not multiplied: 0 * NaN would be NaN
    old_logprobs = torch.where(mask, old_logprobs, zero)
    ref_logprobs = None if ref_logprobs is None else torch.where(mask, ref_logprobs, zero)
    advantage = advantages[:, None]  # [N,1]
    terms: dict[str, Tensor] = {}  # [N,T] each; a fork adds here what it wants logged

    log_ratio = logprobs - old_logprobs  # [N,T]
    ratio = log_ratio.exp()  # [N,T] r_ij
    clipped_ratio = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)  # [N,T] (1)
    surrogate = torch.minimum(ratio * advantage, clipped_ratio * advantage)  # [N,T]

    if ref_logprobs is None:
        kl = torch.zeros_like(logprobs)  # [N,T]
    else:
        kl = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)  # [N,T]

    if sampling_logprobs is not None and config.vllm_importance_sampling_correction:
        mismatch = torch.where(mask, old_logprobs - sampling_logprobs, zero)  # [N,T]
        weight = mismatch.exp().clamp(max=config.vllm_importance_sampling_clip_max)  # [N,T] w_ij
        terms["importance_sampling_ratio"] = weight
        surrogate = weight * surrogate  # last, so that it weighs whatever the policy term is

    # minus: J is maximised, the loss is minimised
    per_token_loss = -surrogate + config.beta * kl  # [N,T]
    if config.beta == 0:
        # an estimate that overflows is still logged, but 0 * inf would be NaN
        per_token_loss = -surrogate
    per_token_loss = torch.where(mask, per_token_loss, zero)
    loss = (weights * per_token_loss).sum()

    terms |= {
        "log_ratio": log_ratio,
        "ratio": ratio,
        "clipped_ratio": clipped_ratio,
        "surrogate": surrogate,
        "kl": kl,
        "per_token_loss": per_token_loss,
    }
    return loss, terms


@torch.no_grad()
def objective_metrics(
    terms: dict[str, Tensor], advantages: Tensor, mask: Tensor, config: ObjectiveConfig
) -> dict[str, Metric]:
    """Compute what to log of the terms, under TRL's names where they mean the same.

    Token means are weighted by tokens, so micro-batches combine to the step's mean. A token counts
    as clipped only where the clip takes its gradient away: below the lower bound with a negative
    advantage, above the upper one with a positive advantage. low_min and high_max are over
    completions. kl is the loss's own estimate, before beta. sampling/importance_sampling_ratio is
    the weight as it was cut, and its share_truncated that of the tokens that were cut. A term [N,T]
    that a fork adds is logged as its token mean, without a line here.
    """
    num_tokens = int(mask.sum())
    if num_tokens == 0:
        return {}
    negative, positive = advantages[:, None] < 0, advantages[:, None] > 0  # [N,1]
    clipped_low = (terms["ratio"] < 1 - config.epsilon_low) & negative & mask  # [N,T]
    clipped_high = (terms["ratio"] > 1 + config.epsilon_high) & positive & mask  # [N,T]
    rows = mask.any(1)  # [N] completions with at least one token
    lengths = mask.sum(1)[rows].to(advantages.dtype)  # [<=N]
    ratio = terms["ratio"][mask]  # [tokens]

    def token_mean(values: Tensor) -> Metric:
        return Metric(values[mask].to(advantages.dtype).mean(), num_tokens, "mean")

    metrics = {
        "kl": token_mean(terms["kl"]),
        "surrogate": token_mean(terms["surrogate"]),
        "approx_kl_old": token_mean(-terms["log_ratio"]),
        "ratio/mean": token_mean(terms["ratio"]),
        "ratio/min": Metric(ratio.min(), 1, "min"),
        "ratio/max": Metric(ratio.max(), 1, "max"),
        "clip_ratio/low_mean": token_mean(clipped_low),
        "clip_ratio/low_min": Metric((clipped_low.sum(1)[rows] / lengths).min(), 1, "min"),
        "clip_ratio/high_mean": token_mean(clipped_high),
        "clip_ratio/high_max": Metric((clipped_high.sum(1)[rows] / lengths).max(), 1, "max"),
        "clip_ratio/region_mean": token_mean(clipped_low | clipped_high),
    }
    if "importance_sampling_ratio" in terms:
        weight = terms["importance_sampling_ratio"]  # [N,T]
        name, cap = "sampling/importance_sampling_ratio", config.vllm_importance_sampling_clip_max
        metrics |= {
            f"{name}/mean": token_mean(weight),
            f"{name}/min": Metric(weight[mask].min(), 1, "min"),
            f"{name}/max": Metric(weight[mask].max(), 1, "max"),
            f"{name}/share_truncated": token_mean(weight >= cap),
        }
    return metrics | {
        name: token_mean(values) for name, values in terms.items() if name not in KNOWN_TERMS
    }
