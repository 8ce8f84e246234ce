"""The demo's GRPO step, phase by phase: the product's forward against the plain one (tests/plain.py), in which every completion has
a prompt of its own and its image goes through the vision tower in every pass, as the engine had it first.

    python tests/benchmarks/grpo_step.py --adapter_name_or_path runs/...-sft

Both get the same completions. They alternate in one process, on one thread; times are CPU time of this process, medians over the
pairs with the smallest and the largest ratio of a pair. Log-probabilities and gradients are compared before anything is timed.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data.collate import collate_rows, plan_batches
from data.encode import EncodedRow
from data.prompts import PROMPTS
from data.records import read_examples
from engine.forward import completion_logprobs
from engine.generate import SamplingConfig, generate
from engine.model import LoadedModel, add_reference, attach_adapter, load_model, use_adapter

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
import plain  # noqa: E402

CPU = torch.device("cpu")


def shared(wrapped, model: LoadedModel, rows: list[EncodedRow]) -> torch.Tensor:
    batch = collate_rows(rows, model.encoder.pad_token_id)
    return completion_logprobs(wrapped, model.family, batch, temperature=0.8, suppress_token_ids=model.suppressed_ids, entropy=True)[0]


def unshared(wrapped, model: LoadedModel, rows: list[EncodedRow]) -> torch.Tensor:
    return plain.logprobs_of(wrapped, model.family, rows, temperature=0.8, suppress_token_ids=model.suppressed_ids, entropy=True)


def scoring(forward: Callable, wrapped, model: LoadedModel, micro_batches: list[list[EncodedRow]]) -> None:
    """Old and reference log-probabilities of the rollout."""
    wrapped.eval()
    for rows in micro_batches:
        with torch.no_grad():
            forward(wrapped, model, rows)
        with use_adapter(wrapped, "reference"):
            forward(wrapped, model, rows)


def updating(forward: Callable, wrapped, model: LoadedModel, micro_batches: list[list[EncodedRow]]) -> torch.Tensor:
    """Log-probabilities and backward pass of every micro-batch; gradients add up. Returns the log-probabilities, end to end."""
    wrapped.train()
    found = []
    for rows in micro_batches:
        logprobs = forward(wrapped, model, rows)
        logprobs.sum().backward()
        found.append(logprobs.detach().flatten())
    return torch.cat(found)


def gradients(wrapped) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    wrapped.zero_grad()
    return found


def seconds(step: Callable, *arguments) -> float:
    start = time.process_time()
    step(*arguments)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter_name_or_path", required=True, help="a finished SFT run of the demo")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="of a rollout; the recipe's 16")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = load_model("demo", dtype=torch.float32, device=CPU, min_visual_tokens=16, max_visual_tokens=16, vision_cache_gb=1.0)
    wrapped = attach_adapter(model, arguments.adapter_name_or_path, trainable=True)
    add_reference(wrapped, arguments.adapter_name_or_path)
    examples = read_examples("demo:rl-train")[: arguments.prompts]
    looks = [seconds(lambda: [model.encode_prompt(example, PROMPTS["demo"]) for example in examples]) for _ in range(2)]
    prompts = [model.encode_prompt(example, PROMPTS["demo"]) for example in examples]
    start = time.process_time()
    groups = generate(wrapped, model, prompts, SamplingConfig(0.8, 0.95, 96), num_generations=4, generator=torch.Generator().manual_seed(0))
    sampled = time.process_time() - start

    def cut(of: list) -> list[list[EncodedRow]]:
        rows = [EncodedRow(prompt, completion.ids, torch.ones(len(completion.ids), dtype=torch.bool))
                for prompt, group in zip(of, groups) for completion in group]
        return [[rows[i] for i in indices] for indices in plan_batches(rows, 32, 8192)]

    ways = {"shared": (shared, cut(prompts)), "plain": (unshared, cut([model.encoder.encode_prompt(e, PROMPTS["demo"]) for e in examples]))}
    results = {name: (updating(forward, wrapped, model, batches), gradients(wrapped)) for name, (forward, batches) in ways.items()}
    (ours, our_gradients), (theirs, their_gradients) = results.values()
    worst = max(float((our_gradients[name] - their_gradients[name]).norm() / their_gradients[name].norm()) for name in our_gradients)
    lengths = [len(completion.ids) for group in groups for completion in group]
    print(f"{len(prompts)} prompts of {len(prompts[0].input_ids)} tokens x 4 completions of {statistics.mean(lengths):.1f} (at most {max(lengths)}), "
          f"2 micro-batches of 32\nlargest difference: log-probabilities {float((ours - theirs).abs().max()):.1e}, "
          f"gradients {worst:.1e} of the parameter's gradient\n"
          f"images, CPU s: {looks[0]:.3f} the first time, {looks[1]:.3f} later; sampling {sampled:.3f}")

    for name, phase in (("old + reference", scoring), ("two updates", updating)):
        pairs = []
        for _ in range(arguments.pairs):
            pairs.append([seconds(phase, forward, wrapped, model, batches) for forward, batches in ways.values()])
            wrapped.zero_grad()
        ratios = [slow / fast for fast, slow in pairs]
        fast, slow = (statistics.median(times) for times in zip(*pairs))
        print(f"{name:16} shared {fast:.3f} s, plain {slow:.3f} s: {statistics.median(ratios):.2f} times as fast "
              f"(from {min(ratios):.2f} to {max(ratios):.2f}, {len(pairs)} pairs)")


if __name__ == "__main__":
    main()
