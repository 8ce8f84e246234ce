"""Count what decoding and training would ask of a GPU: kernels, bytes, waits, shapes, memory.

    python tests/benchmarks/gpu_readiness.py                      # both families, 1 minute, no GPU
    python tests/benchmarks/gpu_readiness.py --out counts.json    # keeps the numbers
    python tests/benchmarks/gpu_readiness.py --before tests/benchmarks/gpu_readiness_before.json

The models are the published ones in all their sizes, but for the vision tower, on torch's meta
device: nothing is computed, everything has its shape (tests/helpers/op_counts.py says how it is
counted, and how a GPU differs). The code is the product's own, with the settings it has on CUDA:
one rollout of 16 prompts x G 4 with 512 new tokens, and one micro-batch of a recipe's size, one
prompt x G 4. bf16, LoRA r 16, prompts of 600 tokens of which 256 are an image.

A token is the mean of the rollout's tokens 9 to 16. Waits are counted over all 512, and the shapes
of the work that would be captured in graphs (without graphs every token had its own), with one
decoder layer of each kind, for they do not depend on depth. What a layer launches is the
difference of the two, and what LoRA moves that of scoring with an adapter and without. Drawing is
counted as in a CUDA graph, where no row needs the search of its whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import checkout  # noqa: F401  this checkout before an installed one
import torch
from transformers import PretrainedConfig

from data.prompts import Prompt
from engine.collate import Batch, collate_rows
from engine.completion import SamplingConfig
from engine.decoding import STEPS
from engine.encode import EncodedPrompt, EncodedRow
from engine.generate import generate
from engine.graphs import Graphs
from engine.model import BaseModel, attach_new_adapter, prepare_for_training
from engine.nucleus import draw
from engine.optim import build_optimizer, clip_gradients, whole_step
from engine.policy import Policy
from engine.runtime import StopRequested
from tests.helpers.op_counts import Counts, OpCounts, as_on_cuda
from tests.helpers.real_configs import base_of, gemma_4b, qwen_3b

FAMILIES = {"qwen2_5_vl": qwen_3b, "gemma3": gemma_4b}
TITLES = {"qwen2_5_vl": "Qwen2.5-VL-3B", "gemma3": "MedGemma-4B"}
PROMPTS, GENERATIONS, NEW_TOKENS = 16, 4, 512
PROMPT_TOKENS, IMAGE_TOKENS = 600, 256
IMAGE_AT = 10  # the place of the image's first token
COUNTED = range(9, 17)  # tokens of a rollout, one look at finished rows among them
DIGITS = {"GB": 2, "peak GB": 2, "MB": 1}

Row = dict[str, float]
Rows = dict[str, Row]


# ---- the published models on the meta device -----------------------------------------------------
def keep_one_layer_of_a_kind(config: PretrainedConfig) -> int:
    """Leave one decoder layer of each kind, and return how many these are."""
    text = config.get_text_config()
    text.layer_types = sorted(set(text.layer_types))
    text.num_hidden_layers = len(text.layer_types)
    return text.num_hidden_layers


def counted_base(config: PretrainedConfig) -> BaseModel:
    """Make a base without values. Its vision tower has one layer, which nothing here runs."""
    config.vision_config.depth = config.vision_config.num_hidden_layers = 1
    return base_of(config, "meta", stop_ids=(1,))


def policy_of(base: BaseModel, *, adapted: bool = True) -> Policy:
    """Make a policy of a base, with a fresh adapter in training or with none."""
    net = base.net
    if adapted:
        net = attach_new_adapter(base, r=16, alpha=32, dropout=0.0)
        prepare_for_training(net, gradient_checkpointing=True, compile=False)
    return Policy(net, base, Prompt("meta", "Which?"), 0.8)


def prompt_of(config: PretrainedConfig) -> EncodedPrompt:
    """Make a prompt with the features of an image, as the cache of features keeps them."""
    types = torch.zeros(PROMPT_TOKENS, dtype=torch.long)
    types[IMAGE_AT : IMAGE_AT + IMAGE_TOKENS] = 1
    side = 2 * int(IMAGE_TOKENS**0.5)
    features = torch.zeros(IMAGE_TOKENS, config.get_text_config().hidden_size, dtype=torch.bfloat16)
    vision = {"features": features, "image_grid_thw": torch.tensor([[1, side, side]])}
    return EncodedPrompt(torch.full((PROMPT_TOKENS,), 5), types, vision)


def micro_batch(config: PretrainedConfig) -> Batch:
    """Make a micro-batch of one prompt's completions, all of full length."""
    prompt = prompt_of(config)
    ids, scored = torch.full((NEW_TOKENS,), 5), torch.ones(NEW_TOKENS, dtype=torch.bool)
    return collate_rows([EncodedRow(prompt, ids, scored)] * GENERATIONS, 0).to("meta")


# ---- phases --------------------------------------------------------------------------------------
def rollout_counts(policy: Policy, tokens: int) -> tuple[list[Counts], int]:
    """Count the prefill and then each of the first `tokens` tokens of a rollout.

    Returns (counts, number of shapes of the work that a GPU captures in graphs).
    """
    counts: list[Counts] = []
    shapes: set[int] = set()
    prompts = [prompt_of(policy.base.net.config) for _ in range(PROMPTS)]
    uniform = [torch.zeros(GENERATIONS, NEW_TOKENS)] * PROMPTS
    sampling = SamplingConfig(0.8, 0.95, NEW_TOKENS)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(STEPS, meta=STEPS["cuda"]))
        stack.enter_context(patch("engine.nucleus._run_if", in_a_graph))
        stack.enter_context(as_on_cuda())
        counter = stack.enter_context(OpCounts())

        def note_shapes(graphs: Graphs, name: str, shape: Hashable, work: Callable) -> None:
            shapes.add(counter.shapes_of(work))

        stack.enter_context(patch.object(Graphs, "run", note_shapes))

        def count() -> bool:
            counts.append(counter.take())
            return len(counts) > tokens

        try:
            generate(
                policy,
                prompts,
                sampling,
                num_generations=GENERATIONS,
                uniform=uniform,
                should_stop=count,
            )
            counts.append(counter.take())
        except StopRequested:
            pass
    return counts, len(shapes)


def counted(work: Callable[[], object]) -> Counts:
    """Count one piece of work, whose result lives until it is counted."""
    with as_on_cuda(), OpCounts() as counter:
        result = work()
        counts = counter.take()
        del result
    return counts


def training_counts(policy: Policy, batch: Batch) -> dict[str, Counts]:
    """Count scoring, the policy's forward and backward, and the optimizer's second step."""
    found: dict[str, Counts] = {}
    policy.net.eval()
    with torch.no_grad():
        found["scoring"] = counted(lambda: policy.logprobs(batch))
    policy.net.train()
    with as_on_cuda(), OpCounts() as counter:
        logprobs, _ = policy.logprobs_and_entropy(batch)
        found["policy forward"] = counter.take()
        logprobs.sum().backward()
        found["backward"] = counter.take()
    with as_on_cuda(), OpCounts(answer=True) as counter:  # yes, all weights are finite
        optimizer = build_optimizer(policy.net, learning_rate=1e-5, weight_decay=0.01)

        def step(number: int) -> None:
            clip_gradients(policy.parameters, 1.0)
            whole_step(optimizer, 1e-5, number)

        step(0)  # makes the optimizer's state
        counter.take()
        step(1)
        found["optimizer step"] = counter.take()
    return found


def in_a_graph(needed: torch.Tensor, work: Callable[[], None]) -> None:
    """Leave out what a CUDA graph leaves out where no row needs it: the search of whole rows."""


def nucleus_counts(config: PretrainedConfig) -> Counts:
    """Count drawing one token for all rows of the rollout from their log-probabilities."""
    rows, vocabulary = PROMPTS * GENERATIONS, config.get_text_config().vocab_size
    logprobs = torch.empty(rows, vocabulary, device="meta")
    uniform = torch.empty(rows, device="meta")
    with patch("engine.nucleus._run_if", in_a_graph):
        return counted(lambda: draw(logprobs, 0.95, uniform))


def mean(counts: list[Counts]) -> Counts:
    """Average what was counted of several tokens, with the highest peak."""
    fields = ("launches", "read", "written", "waits")
    means = {name: sum(getattr(one, name) for one in counts) / len(counts) for name in fields}
    return replace(counts[0], **means, peak=max(one.peak for one in counts))


def row(counts: Counts) -> Row:
    """Give the numbers of a phase that the table shows."""
    return {
        "launches": counts.launches,
        "GB": counts.moved / 1e9,
        "peak GB": counts.peak / 1e9,
        "waits": counts.waits,
    }


# ---- everything of a family ----------------------------------------------------------------------
def rollout_rows(family: str, tokens: int = NEW_TOKENS) -> Rows:
    """Count prefill, a token and a layer of it at full depth, drawing, and all tokens' shapes.

    tokens: of the rollout, whose shapes and waits are counted.
    """
    config, shallow = FAMILIES[family](), FAMILIES[family]()
    layers, kinds = config.get_text_config().num_hidden_layers, keep_one_layer_of_a_kind(shallow)
    (prefill, *found), _ = rollout_counts(policy_of(counted_base(config)), COUNTED.stop - 1)
    (_, *all_tokens), shapes = rollout_counts(policy_of(counted_base(shallow)), tokens)
    token, of_shallow = (
        mean(one[COUNTED.start - 1 : COUNTED.stop - 1]) for one in (found, all_tokens)
    )
    # not the last ones, at which the completions are copied to the host
    before = range(0, tokens - 64, 64)
    waits = [sum(one.waits for one in all_tokens[i : i + 64]) for i in before]
    return {
        "prefill": row(prefill),
        "token": row(token),
        "decoder layer, of a token": {
            "launches": (token.launches - of_shallow.launches) / (layers - kinds)
        },
        "drawing, of a token": row(nucleus_counts(config)),
        f"{tokens} tokens": {
            "shapes": shapes,
            "waits in 64 tokens": max(waits),
        },
    }


def training_rows(family: str) -> Rows:
    """Count the phases of training, and what the adapter adds to a forward."""
    config = FAMILIES[family]()
    base = counted_base(config)
    batch = micro_batch(config)
    with torch.no_grad():
        alone = counted(lambda: policy_of(base, adapted=False).logprobs(batch))
    found = training_counts(policy_of(base), batch)
    tokens = len(batch.prompt_places) + len(batch.read_places)
    adapter = (found["scoring"].moved - alone.moved) / tokens
    return {name: row(counts) for name, counts in found.items()} | {
        "LoRA, of a token and forward": {"MB": adapter / 1e6}
    }


def table(columns: dict[str, dict[str, Rows]]) -> str:
    """Write the numbers in Markdown: {column: {family: its rows}}, a line a phase and number."""
    heads = [f"{TITLES[family]}{name}" for family in FAMILIES for name in columns]
    lines = ["| phase | | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    shown = [found[family] for family in FAMILIES for found in columns.values()]
    for phase, numbers in shown[0].items():
        for what in numbers:
            values = [f"{found[phase][what]:,.{DIGITS.get(what, 0)}f}" for found in shown]
            lines.append(f"| {phase} | {what} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Count, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers here, JSON")
    parser.add_argument("--before", type=Path, help="numbers of another commit, to stand beside")
    arguments = parser.parse_args(argv)
    found = {family: rollout_rows(family) | training_rows(family) for family in FAMILIES}
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.before:
        before = json.loads(arguments.before.read_text())
        print(table({", before": before, ", now": found}))
    else:
        print(table({"": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
