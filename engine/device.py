"""Choose where a run computes, in which precision, and with which random numbers."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import UsageError
from engine.ranks import ALONE, Ranks


def seed_everything(seed: int) -> None:
    """Seed Python, numpy's global state, and torch on every device, so that runs repeat."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# Where the user says how torch's allocator works, in the spelling of either age.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def pick_device(
    num_threads: int | None = None, ranks: Ranks = ALONE, tf32: bool = False
) -> torch.device:
    """Choose the first CUDA device where there is one, else the CPU, and how it computes.

    On a GPU the allocator grows its segments, unless the environment says otherwise: every
    micro-batch has other shapes, which would leave memory in pieces. No number depends on it.

    num_threads: CPU threads for torch's own work there, or None for torch's choice. ranks: each of
    a node's has a CUDA device of its own. tf32: whether float32 products on a GPU are made in TF32.
    Said on a CPU, where it changes nothing.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    cuda = torch.cuda.is_available()
    if cuda and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"  # read when CUDA starts
    if tf32 and not cuda and ranks.first:
        print("note: --tf32 has no effect on a CPU", file=sys.stderr)
    # cuDNN's convolutions take TF32 by torch's default, and are asked as well
    torch.backends.cudnn.allow_tf32 = tf32 and cuda
    torch.set_float32_matmul_precision("high" if tf32 and cuda else "highest")
    if not cuda:
        return torch.device("cpu")
    return torch.device("cuda") if ranks.size == 1 else torch.device("cuda", ranks.local_rank)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device without a wait for the work that is queued there.

    To a GPU a copy is made from pinned memory: from any other the host waits for it.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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


# Flags of /proc/cpuinfo: instructions that multiply bf16 matrices (x86 and Arm).
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def computes_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether a device has instructions for bf16 products, true where nothing says."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        text = cpuinfo.read_text()
    except OSError:
        return True
    return bool(_BF16_FLAGS & set(text.split())) or "flags" not in text.lower()


def slow_bf16(bf16: bool, device: torch.device) -> str | None:
    """Warn in one line of bf16 on a CPU that only imitates it, None where there is no need."""
    if not bf16 or device.type != "cpu" or computes_bf16(device):
        return None
    return (
        "--bf16 on this CPU, which has no bf16 instructions: products were measured at 0.3 to 9"
        " GFLOP/s there, against 60 in float32; --no_bf16 is much faster and takes twice the"
        " memory for the base"
    )
