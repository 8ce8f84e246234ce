"""Compare layouts of the same completions in a training forward.

These are split attention (the product's), one bucket, dense-packed and padded plain.

    python tests/benchmarks/attention_layouts.py [--generations 4 8] [--pairs 5] [--dtype fp32]

All run the decoder forward and backward with gradient checkpointing and adapters of rank 16,
without vision tower and head, on one prompt of 577 tokens (256 an image) and G completions: even
ones of 256 tokens, or ragged ones of 32 to 256 (evenly spaced).

    split    tokens in one row; the prompt attends to itself, each completion to its prompt and
             itself (engine/attention.py)
    one      as split, with completions of all lengths in one bucket, padded in attention alone
    packed   tokens in one row, one mask [M,M] over it for transformers' SDPA; blocks between
             completions are computed and masked
    padded   every completion is a row with its own copy of the prompt, padded to the longest
             (tests/helpers/plain.py)

Hidden states and adapter gradients are compared first. Then the layouts alternate in one process.
Printed are medians of CPU and wall seconds, each layout's time over split's as the median over
pairs with the smallest and largest, and the peak of allocated memory over the loaded model. On a
GPU CPU time is that of launching, and wall time says how fast it is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch import Tensor

import engine.collate
from engine.attention import additive_mask
from engine.collate import Batch, collate_rows
from engine.device import pick_device
from engine.encode import EncodedRow
from engine.families import language_model
from engine.forward import completion_hidden_states, embed, packed_positions
from engine.model import (
    BaseModel,
    attach_new_adapter,
    enable_gradient_checkpointing,
)
from engine.runtime import versions
from tests.helpers import plain
from tests.helpers.memory import (
    DTYPES,
    Sizes,
    allocated_peak,
    load,
    make_prompt,
    model_config,
)

SIZES = Sizes()


def split(wrapped, model: BaseModel, batch: Batch) -> Tensor:
    return completion_hidden_states(wrapped, model.family, batch)[0]


def packed(wrapped, model: BaseModel, batch: Batch) -> Tensor:
    """Run Qwen2.5-VL on one row with one mask: a token sees the earlier ones of its prompt and of
    its own completion.
    """
    read = batch.completion_ids[:, : batch.read_mask.shape[1]].flatten()[batch.read_places]
    embeddings = torch.cat(
        [
            embed(wrapped, batch.prompts).flatten(0, 1)[batch.prompt_places],
            model.net.get_input_embeddings()(read),
        ]
    )
    # -1: a prompt's
    row = torch.cat(
        [torch.full_like(batch.prompt_places, -1), batch.read_places // batch.read_mask.shape[1]]
    )  # [M]
    # [M]
    prompt = torch.cat(
        [
            batch.prompt_places // batch.prompts.input_ids.shape[1],
            batch.prompt_of_row[row[row >= 0]],
        ]
    )
    index = torch.arange(len(row), device=row.device)
    # [M,M]
    sees = (
        (index <= index[:, None])
        & (prompt == prompt[:, None])
        & ((row == -1) | (row == row[:, None]))
    )
    states = language_model(wrapped)(
        inputs_embeds=embeddings[None],
        position_ids=packed_positions(model.net, model.family, batch),
        use_cache=False,
        attention_mask={"full_attention": additive_mask(sees[None, None], embeddings.dtype, 1)},
    ).last_hidden_state[0]
    return states[batch.predictors]


def padded(wrapped, model: BaseModel, batch: plain.PlainBatch) -> Tensor:
    return plain.hidden_states(wrapped, model.family, batch)[0]


def seconds(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return CPU time of this process, and wall-clock time."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def spread_of(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--generations", type=int, nargs="+", default=[4, 8], help="G, completions of the prompt"
    )
    parser.add_argument(
        "--pairs", type=int, default=5, help="rounds, in each of which every layout runs once"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="fp32",
        help="of the base model; adapters are fp32",
    )
    parser.add_argument("--num_threads", type=int, default=1, help="CPU threads of torch")
    arguments = parser.parse_args()

    device, dtype = pick_device(arguments.num_threads), DTYPES[arguments.dtype]
    config = model_config("qwen2_5_vl", SIZES)
    model = load(config, dtype, device)
    wrapped = attach_new_adapter(model, r=16, alpha=32, dropout=0.0).train()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    enable_gradient_checkpointing(wrapped)
    prompt = make_prompt(config, SIZES)
    prompt = replace(
        prompt,
        vision={
            "features": torch.randn(SIZES.image_tokens, SIZES.hidden),
            "image_grid_thw": prompt.vision["image_grid_thw"],
        },
    )
    print(
        f"Qwen2.5-VL, {SIZES.layers} decoder layers, hidden {SIZES.hidden}, {SIZES.heads} heads, 2"
        f" KV heads, {arguments.dtype}, {device}, {arguments.num_threads} thread(s)\n{versions()}\n"
    )
    print(
        "| G | completions | layout | tokens run | CPU s | wall s | CPU / split's | wall / split's"
        " | peak MB |\n" + "|---" * 9 + "|"
    )

    for generations in arguments.generations:
        even = [SIZES.new_tokens] * generations
        ragged = torch.linspace(32, SIZES.new_tokens, generations).long().tolist()
        for kind, lengths in (("even", even), ("ragged", ragged)):
            rows = [
                EncodedRow(
                    prompt,
                    torch.randint(100, SIZES.vocabulary, (n,)),
                    torch.ones(n, dtype=torch.bool),
                )
                for n in lengths
            ]
            shared = collate_rows(rows, 0).to(device)
            with patch.object(engine.collate, "SIMILAR", 0.0):
                one = collate_rows(rows, 0).to(device)
            apart = plain.plain_batch(rows, 0)
            apart = replace(
                apart, prompts=apart.prompts.to(device), loss_mask=apart.loss_mask.to(device)
            )
            signs = torch.randn(sum(lengths), SIZES.hidden, dtype=dtype, device=device)

            def step(forward: Callable, batch, signs: Tensor = signs) -> Tensor:
                wrapped.zero_grad()
                states = forward(wrapped, model, batch)
                (states * signs).sum().backward()
                return states.detach()

            ways = {
                "split": partial(step, split, shared),
                "one": partial(step, split, one),
                "packed": partial(step, packed, shared),
                "padded": partial(step, padded, apart),
            }
            found = {}
            for name, run in ways.items():  # also warms up
                states = run()
                found[name] = (
                    states,
                    torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]),
                )
            for name in ("one", "packed", "padded"):
                for ours, theirs in zip(found[name], found["split"], strict=True):
                    assert float((ours - theirs).norm() / theirs.norm()) < (
                        1e-4 if dtype == torch.float32 else 5e-2
                    ), name
            peaks = {name: allocated_peak(run, device) / 1e6 for name, run in ways.items()}
            rounds = [
                {name: seconds(run, device) for name, run in ways.items()}
                for _ in range(arguments.pairs)
            ]
            tokens = {
                "split": len(shared.prompt_places) + len(shared.read_places),
                "padded": apart.prompts.input_ids.numel(),
            }
            for name in ways:
                cpu, wall = (statistics.median(times[name][i] for times in rounds) for i in (0, 1))
                ratios = [
                    spread_of([times[name][i] / times["split"][i] for times in rounds])
                    for i in (0, 1)
                ]
                print(
                    f"| {generations} | {kind} | {name} | {tokens.get(name, tokens['split'])} |"
                    f" {cpu:.2f} | {wall:.2f} | {ratios[0]} | {ratios[1]} | {peaks[name]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
