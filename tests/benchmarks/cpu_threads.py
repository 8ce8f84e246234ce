"""Measure how long one SFT step of the demo takes with several CPU threads, as a ratio to one
thread.

    python tests/benchmarks/cpu_threads.py [--threads 2] [--rounds 5]

Both variants alternate in one process and the median of the paired ratios is printed, so other work
on the machine hits both. On an idle machine more threads may win. Beside other work they wait for
each other, and the demo's recipe therefore asks for one.
"""

from __future__ import annotations

import argparse
import statistics
import time

import checkout  # noqa: F401  this checkout before an installed one
import torch

from data.examples import read_examples
from data.prompts import PROMPTS
from engine.collate import collate_rows
from engine.families import lm_head_weight
from engine.forward import completion_hidden_states
from engine.logprobs import token_logprobs
from engine.model import attach_new_adapter, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=2, help="the number of threads that is compared with one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps")
    arguments = parser.parse_args()

    model = load_model(
        "demo",
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=16,
        max_visual_tokens=16,
    )
    wrapped = attach_new_adapter(model, r=16, alpha=32, dropout=0.1).train()
    examples = read_examples("demo:sft-train")[:16]
    batch = collate_rows(
        [model.encode_answer(e, PROMPTS["demo"], e.answer) for e in examples],
        model.encoder.pad_token_id,
    )

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        hidden, targets = completion_hidden_states(wrapped, model.family, batch)
        logprobs, _ = token_logprobs(hidden, lm_head_weight(wrapped), targets)
        (-logprobs.mean()).backward()
        return time.perf_counter() - start

    seconds(1), seconds(arguments.threads)  # warm up
    pairs = [(seconds(1), seconds(arguments.threads)) for _ in range(arguments.rounds)]
    ratios = [several / one for one, several in pairs]
    print(
        f"one thread: median {statistics.median(one for one, _ in pairs):.3f} s a step of 16"
        " sequences"
    )
    print(
        f"{arguments.threads} threads / one thread: median {statistics.median(ratios):.2f}, from"
        f" {min(ratios):.2f} to {max(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
