"""Measure what packing pays in SFT, against padded rows and rows one by one.

Answers of different lengths stand in one row without padding.

    python tests/benchmarks/sft_packing.py                                  # 64 to 448 tokens
    python tests/benchmarks/sft_packing.py --shortest 256 --longest 256     # nothing to pad

Both families get 8 rows, on the benchmark models (models.py), with gradient checkpointing, in fp32
on one thread. Image features are known to all sides, so that they differ in nothing else. "packed"
is the product's forward of all rows. "one by one" is the same with micro-batches of one row.
"padded" is the plain forward (tests/helpers/plain.py). A step is Eq. 1, forward and backward.
Gradients are compared first. Then the three alternate in one process. CPU time, medians, and ratios
of the rounds' pairs. Memory is what torch allocates at most at once over the loaded model, from its
profiler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch import Tensor

from engine.collate import collate_rows, plan_batches
from engine.encode import EncodedRow
from engine.families import lm_head_weight
from engine.forward import completion_hidden_states
from engine.logprobs import token_logprobs
from engine.model import attach_adapter, enable_gradient_checkpointing
from tests.benchmarks import models
from tests.benchmarks.models import FAMILIES, Sizes
from tests.benchmarks.steps import gradients, machine, quiet
from tests.helpers import plain
from tests.helpers.memory import allocated_peak


def steps_of(wrapped, model, rows: list[EncodedRow]) -> dict[str, Callable[[], None]]:
    """Make the ways. Each adds the gradients of the mean over all supervised tokens."""
    supervised = sum(len(row.completion_ids) for row in rows)

    def backward(hidden: Tensor, targets: Tensor) -> None:
        logprobs, _ = token_logprobs(hidden, lm_head_weight(wrapped), targets)
        (-logprobs.sum() / supervised).backward()

    def packed(size: int) -> None:
        for indices in plan_batches(rows, size, None):
            backward(
                *completion_hidden_states(
                    wrapped, model.family, collate_rows([rows[i] for i in indices], 0)
                )
            )

    def padded() -> None:
        backward(*plain.hidden_states(wrapped, model.family, plain.plain_batch(rows, 0)))

    return {"packed": lambda: packed(len(rows)), "one by one": lambda: packed(1), "padded": padded}


def compare(family: str, folder: Path, lengths: list[int], sizes: Sizes, rounds: int) -> None:
    model_folder = models.save_checkpoint(family, folder / "model", sizes)
    adapter = models.save_adapter(model_folder, folder / "adapter", 0, sizes)
    model = models.load(model_folder, sizes, vision_cache_gb=1.0)
    wrapped = attach_adapter(model, adapter, trainable=True)
    enable_gradient_checkpointing(wrapped)
    wrapped.train()
    examples = models.make_examples(folder / "images", len(lengths), sizes)
    prompt, generator = (
        models.make_prompt(model, examples[0], sizes),
        torch.Generator().manual_seed(0),
    )
    rows = [
        EncodedRow(
            model.encode_prompt(example, prompt),
            torch.randint(33, 123, (n,), generator=generator),
            torch.ones(n, dtype=torch.bool),
        )
        for example, n in zip(examples, lengths, strict=True)
    ]
    real = sum(sizes.prompt_length + n for n in lengths)
    print(
        f"\n{FAMILIES[family]}: {len(rows)} rows, prompts of {sizes.prompt_length}, answers of"
        f" {min(lengths)} to {max(lengths)} tokens; {real} tokens, padded"
        f" {len(rows) * (sizes.prompt_length + max(lengths))}"
    )
    steps, found = steps_of(wrapped, model, rows), {}
    for name, step in steps.items():
        step()
        found[name] = gradients(wrapped)
        wrapped.zero_grad()
    for name in ("one by one", "padded"):
        worst = max(
            float((found["packed"][key] - other).norm() / other.norm())
            for key, other in found[name].items()
        )
        print(f"  gradients of packed and {name} differ by at most {worst:.1e} of a tensor's norm")
        if not worst < 1e-5:
            raise SystemExit("nothing is timed between two that do not do the same")
    del found

    def seconds(step: Callable[[], None]) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    times = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
    print(f"  {'':12} {'CPU s':>7} {'MB':>7}   times as long as packed")
    for name, step in steps.items():
        wrapped.zero_grad()
        ratios = [of_round[name] / of_round["packed"] for of_round in times]
        print(
            f"  {name:12} {statistics.median(of_round[name] for of_round in times):7.2f}"
            f" {allocated_peak(step, models.CPU) / 1e6:7.0f}   "
            + (
                ""
                if name == "packed"
                else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument(
        "--shortest", type=int, default=64, help="answer, tokens; the others lie evenly between"
    )
    parser.add_argument("--longest", type=int, default=448, help="answer, tokens")
    parser.add_argument("--rounds", type=int, default=5, help="of all three in turn")
    arguments = parser.parse_args()
    quiet()
    print(machine())
    lengths = (
        torch.linspace(arguments.shortest, arguments.longest, arguments.rows)
        .round()
        .long()
        .tolist()
    )
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            compare(family, Path(folder), lengths, Sizes(), arguments.rounds)


if __name__ == "__main__":
    main()
