"""Choose where a run computes, in which precision, and with which random numbers."""

from __future__ import annotations

import random

import numpy as np
import torch

from engine.config import UsageError


def seed_everything(seed: int) -> None:
    """Seed Python, numpy's global state, and torch on every device, so that runs repeat."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(num_threads: int | None = None) -> torch.device:
    """Choose the first CUDA device where there is one, else the CPU.

    num_threads: CPU threads for torch's own work there, or None for torch's choice.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def base_dtype(bf16: bool, device: torch.device) -> torch.dtype:
    """Choose the base model's precision, as --bf16 says.

    Raises UsageError for bf16 on a GPU that has none (before NVIDIA's Ampere generation).
    """
    if (
        bf16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UsageError(
            f"--bf16: {torch.cuda.get_device_name(device)} has no bfloat16; use --no_bf16 for"
            " float32"
        )
    return torch.bfloat16 if bf16 else torch.float32
