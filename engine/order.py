"""Draw the order of the training examples: a function of seed and epoch, for both run scripts."""

from __future__ import annotations

import torch


def shuffled(count: int, epoch: int, seed: int) -> list[int]:
    """Shuffle the indices of `count` examples for one epoch.

    The order depends on seed and epoch alone, so a resume needs no position of a loader.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()
