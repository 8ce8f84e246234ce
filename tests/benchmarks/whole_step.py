"""Measure what it costs to make an optimizer step wholly or not at all, and to look at a state.

    python tests/benchmarks/whole_step.py [--parameters 30000000] [--repeats 40]

`whole_step` copies parameters and moments before a step and looks whether the weights are finite.
It is compared with `optimizer.step()` alone, alternated, by the median of the ratios. The last line
is the time of the look at adapter and moments before a save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from engine.optim import build_optimizer, whole_step
from engine.saving import check_finite
from engine.state_tensors import optimizer_to_tensors

# LoRA of rank 16 on a square projection of 2,048: its A and its B
ROWS, COLUMNS = 16, 2048


def lora(parameters: int) -> nn.Module:
    """Make matrices of a LoRA's shapes with about so many parameters, with gradients."""
    model = nn.Module()
    for number in range(max(2, round(parameters / (ROWS * COLUMNS)))):
        shape = (ROWS, COLUMNS) if number % 2 else (COLUMNS, ROWS)
        value = nn.Parameter(torch.randn(shape) * 0.01)
        value.grad = torch.randn(shape) * 0.01
        model.register_parameter(f"matrix{number}", value)
    return model


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print both times, the median of their ratios, and the time of the look before a save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=30_000_000)
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    model = lora(arguments.parameters)
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=0.01)
    for _ in range(2):
        whole_step(optimizer, 1e-4, 1)
    pairs = [
        (seconds(optimizer.step), seconds(lambda: whole_step(optimizer, 1e-4, 1)))
        for _ in range(arguments.repeats)
    ]
    alone, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(one[1] / one[0] for one in pairs)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(list(model.parameters()))} matrices")
    print(f"optimizer.step() {1e3 * alone:.2f} ms, whole_step {1e3 * whole:.2f} ms: {ratio:.2f}x")
    state = {name: one.detach() for name, one in model.named_parameters()}
    state |= optimizer_to_tensors(optimizer)[0]
    looks = [seconds(lambda: check_finite(state, "the state")) for _ in range(10)]
    print(f"look before a save {1e3 * statistics.median(looks):.2f} ms")


if __name__ == "__main__":
    main()
