"""Compare the head's log-probabilities with all logits at once in memory and time.

The head is engine/logprobs.py. Both run forward and backward.

    python tests/benchmarks/logprob_head.py                                   # about 20 minutes
    python tests/benchmarks/logprob_head.py --hidden 256 --dtypes fp32        # minutes
    python tests/benchmarks/logprob_head.py --chunk_sizes 64 128 256 512      # ours with others too

By default both vocabularies run with the real hidden sizes. "full" is log_softmax(hidden @
head.T).gather(targets) with autograd, the whole [tokens, vocabulary] matrix. Its entropy is taken
from the same log_softmax without gradient. Both get the same hidden states and head.
Log-probabilities and the gradients of the hidden states are compared before anything is timed. The
head is frozen on both sides, temperature 1.

Memory is what the process's resident size reaches over that of the loaded inputs (Linux: VmHWM,
reset before the pass), each variant in a process of its own. It holds the result and the gradient
of the hidden states as well. For times the variants alternate in one process, on one thread: CPU
time of this process and wall clock, medians over the rounds, ratios of the rounds' pairs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch import Tensor

from engine.logprobs import CHUNK_SIZE, token_logprobs
from tests.benchmarks.steps import machine, quiet
from tests.helpers.memory import DTYPES, resident

REAL_HIDDEN = {151_936: 2048, 262_208: 2560}  # Qwen2.5-VL-3B and Gemma 3 4B
# -> log-probabilities [N], gradient of the hidden states [N,H]
Step = Callable[[], tuple[Tensor, Tensor]]


def make_inputs(
    tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states [N,H] with gradient, a head [V,H] and targets [N], so that logits have the
    size of a real model's.
    """
    torch.manual_seed(0)
    head = torch.empty(vocabulary, hidden, dtype=dtype).normal_(std=3 / hidden**0.5)
    return (
        torch.randn(tokens, hidden).to(dtype).requires_grad_(),
        head,
        torch.randint(vocabulary, (tokens,)),
    )


def full_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logprobs = (hidden @ head.t()).float().log_softmax(1)  # [N,V]
    found = -(logprobs.detach().exp() * logprobs.detach()).sum(1) if entropy else None
    return logprobs.gather(1, targets[:, None])[:, 0], found


def make_step(variant: str, entropy: bool, hidden: Tensor, head: Tensor, targets: Tensor) -> Step:
    """Make the pass of a variant: "full", or the size of a chunk."""

    def step() -> tuple[Tensor, Tensor]:
        if variant == "full":
            logprobs, _ = full_logprobs(hidden, head, targets, entropy)
        else:
            logprobs, _ = token_logprobs(
                hidden, head, targets, chunk_size=int(variant), entropy=entropy
            )
        (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
        return logprobs.detach(), gradient

    return step


def grown_peak(step: Callable) -> int:
    """Measure the bytes that the process's resident memory reaches over what it is before `step`
    (Linux).
    """
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
    before = resident("VmRSS")
    kept = step()
    peak = resident("VmHWM") - before
    del kept
    return peak


def measure(
    variant: str, entropy: bool, tokens: int, vocabulary: int, hidden: int, dtype: str
) -> None:
    """Print one variant's peak, in a process of its own."""
    quiet()
    # what libraries load once
    make_step(variant, entropy, *make_inputs(8, 64, hidden, DTYPES[dtype]))()
    print(
        grown_peak(
            make_step(variant, entropy, *make_inputs(tokens, vocabulary, hidden, DTYPES[dtype]))
        )
    )


def child_peak(*case) -> float:
    """Measure a variant's peak in a child process, in MB."""
    output = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, case)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return int(output.split()[-1]) / 1e6


def seconds(step: Step) -> tuple[float, float]:
    """Return CPU time and wall clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare(
    tokens: int, vocabulary: int, hidden: int, dtype: str, chunk_sizes: list[int], rounds: int
) -> None:
    """Print one table: a row for every variant."""
    print(f"\n{tokens} tokens, vocabulary {vocabulary:,}, hidden {hidden}, {dtype}")
    inputs = make_inputs(tokens, vocabulary, hidden, DTYPES[dtype])
    variants = ["full", *map(str, chunk_sizes)]
    expected, gradient = make_step("full", False, *inputs)()
    for variant in variants[1:]:
        found, of_hidden = make_step(variant, True, *inputs)()
        print(
            f"  chunk {variant}: log-probabilities differ by at most"
            f" {float((found - expected).abs().max()):.1e}, gradients by"
            f" {float((of_hidden - gradient).norm() / gradient.norm()):.1e} of their norm"
        )
    del expected, gradient, found, of_hidden
    print(
        f"  {'':26} {'peak MB':>8} {'CPU s':>7} {'wall s':>7}   full / this, by CPU time   by wall"
        " clock"
    )
    for entropy in (False, True):
        steps = {variant: make_step(variant, entropy, *inputs) for variant in variants}
        times = [{variant: seconds(step) for variant, step in steps.items()} for _ in range(rounds)]
        for variant in variants:
            cpu, wall = ([found[variant][field] for found in times] for field in (0, 1))
            ratios = [
                [found["full"][field] / found[variant][field] for found in times]
                for field in (0, 1)
            ]
            name = ("full logits" if variant == "full" else f"ours, chunk {variant}") + (
                ", entropy" if entropy else ""
            )
            peak = child_peak(variant, int(entropy), tokens, vocabulary, hidden, dtype)
            print(
                f"  {name:26} {peak:8.0f} {statistics.median(cpu):7.2f}"
                f" {statistics.median(wall):7.2f}   "
                + ("" if variant == "full" else f"{spread(ratios[0]):24}   {spread(ratios[1])}"),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1000, help="that are scored")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(REAL_HIDDEN))
    parser.add_argument(
        "--hidden",
        type=int,
        help="hidden size; by default the real model's, 2048 for 151,936 and 2560 otherwise",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(DTYPES),
        default=list(DTYPES),
        help="of hidden states and head",
    )
    parser.add_argument(
        "--chunk_sizes", nargs="+", type=int, default=[CHUNK_SIZE], help="of ours, tokens"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of all variants in turn")
    parser.add_argument(
        "--measure",
        nargs=6,
        metavar=("VARIANT", "ENTROPY", "TOKENS", "VOCABULARY", "HIDDEN", "DTYPE"),
        help=argparse.SUPPRESS,
    )
    arguments = parser.parse_args()
    if arguments.measure:
        variant, *numbers, dtype = arguments.measure
        entropy, *sizes = map(int, numbers)
        return measure(variant, bool(entropy), *sizes, dtype)
    quiet()
    print(machine())
    for vocabulary in arguments.vocabularies:
        for dtype in arguments.dtypes:
            compare(
                arguments.tokens,
                vocabulary,
                arguments.hidden or REAL_HIDDEN.get(vocabulary, 2560),
                dtype,
                arguments.chunk_sizes,
                arguments.rounds,
            )


if __name__ == "__main__":
    main()
