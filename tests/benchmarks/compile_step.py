"""Measure what --compile costs and gains in scoring and updates of the demo's GRPO step.

    python tests/benchmarks/compile_step.py [--model demo] [--dtype fp32] [--pairs 5]

Two copies of a model with the same random adapter get the same random completions (16 prompts x 4,
up to 96 tokens, two micro-batches). First come the first pass of each, the graphs so far and the
largest difference. The compiled one's first pass compiles: TORCHINDUCTOR_COMPILE_THREADS=1 keeps
all of it in this process and those it waits for, and a new TORCHINDUCTOR_CACHE_DIR makes it begin
from nothing. Then the two alternate in one process: medians of CPU and wall seconds, and the ratio
without / with --compile as the median over pairs with the smallest and largest. On a GPU the wall
time counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch._dynamo.utils import counters

from data.examples import read_examples
from data.prompts import PROMPTS
from engine.collate import Batch, collate_rows
from engine.device import pick_device
from engine.encode import EncodedRow
from engine.forward import completion_logprobs
from engine.model import (
    attach_new_adapter,
    compile_decoder,
    enable_gradient_checkpointing,
    load_model,
)
from engine.runtime import versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Step:
    """Hold a model, with its batches on the device."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, compiled: bool):
        self.device = device
        self.model = load_model(
            arguments.model,
            dtype=DTYPES[arguments.dtype],
            device=device,
            min_visual_tokens=16,
            max_visual_tokens=16,
        )
        torch.manual_seed(0)
        self.wrapped = attach_new_adapter(self.model, r=16, alpha=32, dropout=0.0)
        for name, parameter in self.wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        enable_gradient_checkpointing(self.wrapped)
        if compiled:
            compile_decoder(self.wrapped)
        prompts = [
            self.model.encode_prompt(example, PROMPTS["demo"])
            for example in read_examples("demo:rl-train")[:16]
        ]
        self.micro_batches = [self.batch(prompts[:8]), self.batch(prompts[8:])]

    def batch(self, prompts: list) -> Batch:
        lengths = torch.randint(24, 97, (4 * len(prompts),)).tolist()
        rows = [
            EncodedRow(
                prompts[i // 4], torch.randint(100, 200, (n,)), torch.ones(n, dtype=torch.bool)
            )
            for i, n in enumerate(lengths)
        ]
        return collate_rows(rows, self.model.encoder.pad_token_id).to(self.device)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        return completion_logprobs(
            self.wrapped,
            self.model.family,
            batch,
            temperature=0.8,
            suppress_token_ids=self.model.suppressed_ids,
        )[0]

    @torch.no_grad()
    def score(self) -> None:
        self.wrapped.eval()
        for batch in self.micro_batches:
            self.logprobs(batch)

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and gradients, each end to end."""
        self.wrapped.train().zero_grad()
        found = []
        for batch in self.micro_batches:
            logprobs = self.logprobs(batch)
            logprobs.sum().backward()
            found.append(logprobs.detach().flatten())
        return torch.cat(found), torch.cat(
            [p.grad.flatten() for p in self.wrapped.parameters() if p.requires_grad]
        )


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return CPU time of this process and of the compilers it waited for, and wall-clock time."""

    def used() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    cpu, wall = used(), time.perf_counter()
    run()
    return used() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model", choices=("demo", "demo-gemma"), default="demo", help="embedded checkpoint"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="fp32",
        help="of the base model; adapters are fp32",
    )
    parser.add_argument("--pairs", type=int, default=5, help="times that both run")
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args()

    device = pick_device(arguments.num_threads)
    print(
        f"{arguments.model}, {arguments.dtype}, {device}, {arguments.num_threads}"
        f" thread(s)\n{versions()}"
    )
    plain, compiled = Step(arguments, device, False), Step(arguments, device, True)
    results = {}
    for name, step in (("without", plain), ("with", compiled)):

        def first_pass(name: str = name, step: Step = step) -> None:
            step.score()
            results[name] = step.update()

        cpu, wall = seconds(first_pass, device)
        print(
            f"first pass {name} --compile: {cpu:.1f} CPU s, {wall:.1f} s;"
            f" {counters['stats']['unique_graphs']} graphs"
        )
    (logprobs, gradients), (expected, eager) = results["with"], results["without"]
    print(
        f"largest difference of log-probabilities {float((logprobs - expected).abs().max()):.1e};"
        f" of gradients, in L2, {float((gradients - eager).norm() / eager.norm()):.1e} of theirs\n"
    )
    for phase in ("score", "update"):
        pairs = [
            [seconds(getattr(step, phase), device) for step in (plain, compiled)]
            for _ in range(arguments.pairs)
        ]
        for i, clock in enumerate(("CPU", "wall")):
            ratios = [without[i] / having[i] for without, having in pairs]
            medians = [statistics.median(pair[which][i] for pair in pairs) for which in (0, 1)]
            print(
                f"{phase:6} {clock:4} s: {medians[0]:.3f} without, {medians[1]:.3f} with; ratio"
                f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f},"
                f" {len(pairs)} pairs)"
            )


if __name__ == "__main__":
    main()
