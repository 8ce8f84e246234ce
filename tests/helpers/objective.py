"""Make inputs for the objective and compare what comes out with numbers worked out by hand."""

from __future__ import annotations

import torch

MAX_COMPLETION_LENGTH = 7  # of the step that a random batch is
# Three groups of two completions: two of hospital 4, the second settled, and one of hospital 9.
HOSPITAL_REWARDS = [1, 0, 1, 1, 0.5, 0]
HOSPITAL_GROUPS, HOSPITALS = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([4, 4, 4, 4, 9, 9])


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights_of(objective, mask, loss_type, max_completion_length=1):
    """Return the weights of a step that consists of just these rows."""
    return objective.token_weights(
        mask,
        loss_type,
        num_completions=len(mask),
        num_tokens=int(mask.sum()),
        max_completion_length=max_completion_length,
        dtype=torch.float64,
    )


def close(actual, expected, atol=1e-9) -> None:
    """Check that values equal numbers that were worked out by hand."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), f64(expected), rtol=0, atol=atol
    )


def random_batch(seed: int) -> dict[str, torch.Tensor]:
    """Draw six completions of up to five tokens in fp64, in every quadrant of the clip.

    They lie well away from its corners, log 0.85 = -0.163 and log 1.22 = 0.199: the log-ratio is in
    [-0.55, -0.25], [-0.15, 0.15] or [0.25, 0.55]. Advantages are at least 0.1 in size, of both
    signs, and one is 0. Lengths are uneven and one completion has no token.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=random, dtype=torch.float64) * (high - low) + low

    shape = 6, 5
    logprobs = uniform(-3, -0.1, *shape)
    # all of -1, 0, 1
    side = torch.arange(30).view(shape)[:, torch.randperm(5, generator=random)] % 3 - 1
    sign = torch.tensor([1, -1, 1, -1, 0, 1])[torch.randperm(6, generator=random)]
    lengths = torch.tensor([5, 3, 0, 1, 4, 2])[torch.randperm(6, generator=random)]
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs - (0.4 * side + uniform(-0.15, 0.15, *shape)),
        "ref_logprobs": logprobs + uniform(-1.5, 1.5, *shape),
        "advantages": sign * uniform(0.1, 2, 6),
        "mask": torch.arange(5)[None, :] < lengths[:, None],
        "sampling_logprobs": uniform(-3, -0.1, *shape),
        "entropy": uniform(0, 2, *shape),
    }


def step_weights(objective, mask, loss_type, num_tokens=15, dtype=torch.float64):
    """Return the weights in a step that is one random batch: six completions, 15 tokens."""
    return objective.token_weights(
        mask,
        loss_type,
        num_completions=6,
        num_tokens=num_tokens,
        max_completion_length=MAX_COMPLETION_LENGTH,
        dtype=dtype,
    )
