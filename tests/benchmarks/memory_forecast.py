"""Compare the memory forecast of engine/memory.py with measured peaks, or print it for real
recipes.

    python tests/benchmarks/memory_forecast.py             # each case in a process of its own
    python tests/benchmarks/memory_forecast.py --cards     # the shipped recipes on 24 to 141 GB

--cards is arithmetic and measures nothing. Measured is what a phase allocates over the loaded
model, with its adapters. On a CPU these are every allocation of torch, from its profiler (exact,
the same each time), and beside it the growth of the process's resident memory (VmHWM), which adds
what libraries hold and pages that malloc keeps. On a GPU it is torch.cuda.max_memory_allocated. The
models are random: 3 decoder layers, hidden 512, MLP 1376, 8 heads, 2 KV heads, vocabulary 4,096.
Prompts have 577 tokens, 256 of them an image, and completions 256.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace

import checkout  # noqa: F401  this checkout before an installed one
import torch

from data.prompts import PROMPTS, SYSTEM_PROMPT
from engine.config import parse_config
from engine.eval_batch import EVALUATING, most_that_fit
from engine.memory import GIB, ModelShape, Workload, forecast, model_shape
from engine.memory_table import CARDS, USABLE, memory_table
from engine.remedies import largest
from engine.settings import SFTConfig
from rl.objective import ObjectiveConfig
from rl.plan import BatchPlan
from rl.settings import GRPOConfig
from tests.helpers.memory import (
    CLASSES,
    DTYPES,
    PHASES,
    Sizes,
    allocated_peak,
    prepare,
    resident,
)
from tests.helpers.real_configs import REAL_CONFIGS


def measure(family: str, phase: str, dtype: str) -> None:
    """Print forecast, allocated and resident bytes of one case, in a process of its own."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, expected = prepare(family, phase, Sizes(), DTYPES[dtype], device)
    before = resident("VmRSS")
    step()
    grown = resident("VmHWM") - before
    print(expected, allocated_peak(step, device), grown)


def compare(families: list[str], dtypes: list[str], phases: list[str]) -> None:
    print(
        f"{'family':12} {'dtype':5} {'phase':18} {'forecast MB':>12} {'allocated MB':>13}"
        f" {'ratio':>6} {'resident MB':>12}"
    )
    for family, dtype, phase in (
        (family, dtype, phase) for family in families for dtype in dtypes for phase in phases
    ):
        command = [sys.executable, __file__, "--measure", family, phase, dtype]
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        expected, allocated, grown = map(int, output.split()[-3:])
        print(
            f"{family:12} {dtype:5} {phase:18} {expected / 1e6:12.1f} {allocated / 1e6:13.1f}"
            f" {expected / allocated:6.2f} {grown / 1e6:12.1f}",
            flush=True,
        )


# ---- the shipped recipes on real cards: arithmetic -----------------------------------------------
FAMILY_OF = {"gemma": "gemma3", "qwen3-vl": "qwen3_vl"}  # by a part of the model's name


def published_shape(name: str) -> ModelShape:
    """Return the published sizes of a recipe's model. Its parameters are counted on the meta
    device.
    """
    family = next(
        (family for part, family in FAMILY_OF.items() if part in name.casefold()), "qwen2_5_vl"
    )
    config = REAL_CONFIGS[family]()
    with torch.device("meta"):
        base = CLASSES[config.model_type](config)
    base.tie_weights()
    return model_shape(config, sum(parameter.numel() for parameter in base.parameters()))


def recipe_work(recipe: str, script: str) -> tuple[str, Workload]:
    """Return model and workload of a shipped recipe on a GPU.

    No tokenizer is at hand: a prompt's text counts a token for four characters and 30 for the
    chat's frame. Answers are taken as long as max_completion_length, images as max_visual_tokens.
    """
    config = parse_config(
        [SFTConfig] if script == "sft" else [GRPOConfig, ObjectiveConfig],
        ["--recipe", recipe],
        script=script,
        prog="",
    ).configs[0]
    sft, micro, group = (
        script == "sft",
        config.per_device_train_batch_size,
        1 if script == "sft" else config.num_generations,
    )
    image = 256 if "gemma" in config.model_name_or_path else config.max_visual_tokens
    text = 30 + len(SYSTEM_PROMPT + PROMPTS[config.prompt].text) // 4
    work = Workload(
        element_size=2 if config.bf16 else 4,
        device="cuda",
        lora_r=16,
        lora_dropout=config.lora_dropout if sft else 0.0,
        adapters=1 if sft else 2,
        gradient_checkpointing=config.gradient_checkpointing,
        prompt_length=image + text,
        image_tokens=image,
        completion_length=config.max_completion_length,
        max_completion_length=config.max_completion_length,
        micro_batch=micro,
        eval_rows=config.per_device_eval_batch_size,
        rollout_prompts=0 if sft else BatchPlan.of(config).prompts,
        num_generations=group,
        max_tokens_per_forward=config.max_tokens_per_forward,
    )
    return config.model_name_or_path, work


def phase_fits(shape: ModelShape, work: Workload, phase: str, card: int) -> bool:
    return sum(forecast(shape, work).phases[phase].values()) <= USABLE * card * GIB


def most_rows(shape: ModelShape, work: Workload, field: str, phase: str, card: int) -> int:
    """Find how large a field of `work` may be for a phase to fit on a card."""
    return largest(lambda n: phase_fits(shape, replace(work, **{field: n}), phase, card), 4096)


def eval_rows(shape: ModelShape, work: Workload, card: int) -> int:
    """Find how many rows an evaluation decodes on a card where no setting says it."""
    phases = [phase for phase in EVALUATING if phase in forecast(shape, work).phases]
    return most_that_fit(
        lambda n: all(phase_fits(shape, replace(work, eval_rows=n), of, card) for of in phases)
    )


RECIPES = (
    "medgemma-4b-free-reasoning",
    "qwen2.5-vl-3b-reasoning-a",
    "qwen2.5-vl-3b-24gb",
    "qwen3-vl-4b-reasoning-a",
)


def cards() -> None:
    """Print for every shipped recipe of a real model: forecast by part, cards that hold it, and the
    largest batches that they hold.
    """
    print("Arithmetic for a GPU, not measured on one.")
    shapes: dict[str, ModelShape] = {}
    for recipe in RECIPES:
        for script in ("sft", "grpo"):
            name, work = recipe_work(recipe, script)
            shape = shapes[name] = shapes.get(name) or published_shape(name)
            found = forecast(shape, work)
            rows = (
                f", {work.rollout_prompts * work.num_generations} rows a rollout"
                if work.rollout_prompts
                else ""
            )
            print(
                f"\n{recipe} {script}: {name}, {shape.base_parameters:,} parameters; prompt"
                f" {work.prompt_length}, of them image {work.image_tokens}, completion"
                f" {work.completion_length}; {work.micro_batch} rows a micro-batch{rows},"
                f" {work.eval_rows} decoded together"
            )
            print(memory_table(found, torch.device("cuda")))
            for card in CARDS:
                free = replace(work, max_tokens_per_forward=None)
                update = most_rows(shape, free, "micro_batch", "update", card)
                line = (
                    f"  {card} GB holds at most {update} rows a micro-batch; unset, an evaluation"
                    f" decodes {eval_rows(shape, work, card)} rows together"
                )
                if work.rollout_prompts:
                    prompts = most_rows(shape, work, "rollout_prompts", "rollout", card)
                    line += f", {prompts * work.num_generations} rows a rollout"
                print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cards",
        action="store_true",
        help="forecast the shipped recipes on cards of 24 to 141 GB instead",
    )
    parser.add_argument("--families", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument(
        "--measure", nargs=3, metavar=("FAMILY", "PHASE", "DTYPE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    elif arguments.cards:
        cards()
    else:
        compare(arguments.families, arguments.dtypes, arguments.phases)


if __name__ == "__main__":
    main()
