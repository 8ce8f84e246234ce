"""Measure every phase of a GRPO step on this machine's GPU: time, memory, share of its limits.

    python tests/benchmarks/gpu.py                                        # one card, minutes
    python tests/benchmarks/gpu.py --models qwen2.5-vl-3b
    python tests/benchmarks/gpu.py --scale 16 --prompts 1 --new_tokens 3  # rehearsal on a CPU, 8 s

It is made to take at most 8 minutes, and has run in the rehearsal alone: nobody had a card yet.

The models have the published sizes of MedGemma-4B and Qwen2.5-VL-3B with random weights, made on
the device: no file is read, nothing is downloaded. bf16, LoRA r 16 with a frozen reference, 16
prompts x G 4 with 512 new tokens, prompts of 600 tokens of which 256 are an image. It is the
product's own code, phase by phase as run_grpo.py calls it, in micro-batches of one prompt.

Random weights would give every token the same probability, and no nucleus would ever be small. So
the temperature is far below 1, which makes a nucleus of a few tokens, as in a trained model.

The forecast is that of `--dry_run` (engine/memory.py). The limits are what the card reaches here in
a copy of 1 GiB and in a product of two large matrices. Decoding is compared with the first (weights
and keys and values read once a token), the forwards with the second (2 operations a weight and
token, three times as many in an update: forward, recomputed forward, backward through frozen
weights).
"""

from __future__ import annotations

import argparse
import configparser
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import checkout  # noqa: F401  this checkout before an installed one
import torch
from torch import Tensor

from data.prompts import Prompt
from engine.collate import Batch, collate_rows
from engine.completion import Completion, SamplingConfig
from engine.decoding import STEPS
from engine.device import pick_device
from engine.encode import EncodedPrompt, EncodedRow
from engine.generate import generate
from engine.memory import GIB, ModelShape, Workload, forecast, layer_parameters, model_shape
from engine.model import add_reference, attach_new_adapter, prepare_for_training
from engine.optim import build_optimizer, clip_gradients, whole_step
from engine.policy import Policy
from engine.random_numbers import uniform_numbers
from rl.objective import ObjectiveConfig, grpo_loss, token_weights
from tests.helpers.hub_folder import MODELS, scaled
from tests.helpers.real_configs import base_of

TITLES = {"gemma-3-4b": "MedGemma-4B", "qwen2.5-vl-3b": "Qwen2.5-VL-3B"}
GENERATIONS, PROMPT_TOKENS, IMAGE_TOKENS, IMAGE_AT = 4, 600, 256, 10
TEMPERATURE, TOP_P = 0.1, 0.95
STOP_EVERY = 64  # one id in so many ends a completion of the ragged rollout
SFT_IMAGES, GRPO_IMAGES = 2000, 1000  # of the paper
BF16 = 2  # bytes


@dataclass
class Phase:
    """Hold what was measured of a phase: seconds, peak bytes (0 where unknown), and what it is
    compared with: the forecast's bytes, the bytes that it moves or the operations that it makes.
    """

    name: str
    seconds: float
    peak: int
    forecast: int = 0
    moved: float = 0.0
    operations: float = 0.0


class Meter:
    """Measure phases on a device, one after another."""

    def __init__(self, device: torch.device):
        self.device = device
        self.phases: list[Phase] = []

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Measure the block as a phase, to which the caller adds what it is compared with."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        began = time.perf_counter()
        phase = Phase(name, 0.0, 0)
        yield phase
        self.wait()
        phase.seconds = time.perf_counter() - began
        if self.device.type == "cuda":
            phase.peak = torch.cuda.max_memory_allocated()
        self.phases.append(phase)


# ---- the model and its inputs --------------------------------------------------------------------
def random_policy(name: str, scale: int, device: torch.device) -> Policy:
    """Make a policy with a reference of the published sizes, or of a part of them."""
    config = MODELS[name]()
    config = scaled(config, scale) if scale > 1 else config
    torch.manual_seed(0)
    # without stop tokens, so that all completions have full length
    base = base_of(config, device)
    adapted = attach_new_adapter(base, r=16, alpha=32, dropout=0.0)
    add_reference(adapted)
    for part, weight in adapted.named_parameters():
        if "lora_B.default" in part:  # so that policy and reference differ
            torch.nn.init.normal_(weight, std=1e-3)
    prepare_for_training(adapted, gradient_checkpointing=True, compile=False)
    return Policy(adapted, base, Prompt("gpu", "Which?"), TEMPERATURE)


def random_prompt(policy: Policy) -> EncodedPrompt:
    """Make a prompt of random tokens with an image of noise, and run the tower on it."""
    net, family = policy.base.net, policy.family
    side = 2 * int(IMAGE_TOKENS**0.5)  # patches, four for each token
    if net.config.model_type == "gemma3":
        size = net.config.vision_config.image_size
        image = {"pixel_values": torch.randn(1, 3, size, size)}
    else:
        values = family.patches(net.config)[1]
        image = {
            "pixel_values": torch.randn(side * side, values),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
    with torch.no_grad():
        seen = family.embed_image(net, {k: v.to(policy.device) for k, v in image.items()})
    types = torch.zeros(PROMPT_TOKENS, dtype=torch.long)
    types[IMAGE_AT : IMAGE_AT + IMAGE_TOKENS] = 1
    ids = torch.randint(100, 1000, (PROMPT_TOKENS,))
    kept = {name: tensor.cpu() for name, tensor in seen.items()}
    return EncodedPrompt(ids, types, {**image, **kept})


def micro_batches(
    prompts: list[EncodedPrompt], groups: list[list[Completion]], device: torch.device
) -> Iterator[Batch]:
    """Make a batch of each prompt with its completions."""
    for prompt, group in zip(prompts, groups, strict=True):
        rows = [
            EncodedRow(prompt, one.ids, torch.ones_like(one.ids, dtype=torch.bool)) for one in group
        ]
        yield collate_rows(rows, 0).to(device)


# ---- what a phase is compared with ---------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """Say what is run: B prompts with new tokens each, of a model of these sizes."""

    shape: ModelShape
    prompts: int
    new_tokens: int

    @property
    def weights(self) -> int:
        """Return the parameters that a token is multiplied with, but for the head."""
        return self.shape.layers * layer_parameters(self.shape)

    @property
    def head(self) -> int:
        """Return the parameters of the head."""
        return self.shape.vocabulary * self.shape.hidden

    @property
    def rows(self) -> int:
        """Return the completions of the rollout."""
        return self.prompts * GENERATIONS

    def uniform(self) -> list[Tensor]:
        """Return the numbers [G,T] that decide each prompt's completions."""
        return [
            uniform_numbers("rollout", 0, place, GENERATIONS, self.new_tokens)
            for place in range(self.prompts)
        ]

    def decoding_bytes(self) -> float:
        """Return what decoding must at least read: weights, head, keys and values, each token."""
        kept = 2 * BF16 * self.shape.layers * self.shape.key_width
        keys = self.prompts * PROMPT_TOKENS + self.rows * self.new_tokens / 2
        return self.new_tokens * (BF16 * (self.weights + self.head) + kept * keys)

    def operations(self, groups: int, passes: int, head_passes: int) -> float:
        """Return the operations of forwards over so many groups with their prompts."""
        scored = groups * GENERATIONS * self.new_tokens
        tokens = groups * PROMPT_TOKENS + scored
        return 2.0 * (passes * self.weights * tokens + head_passes * self.head * scored)

    def forecast(self, device: torch.device) -> dict[str, int]:
        """Forecast the bytes of each phase of the run."""
        work = Workload(
            element_size=BF16,
            device=device.type,
            lora_r=16,
            lora_dropout=0.0,
            adapters=2,
            gradient_checkpointing=True,
            prompt_length=PROMPT_TOKENS,
            image_tokens=IMAGE_TOKENS,
            completion_length=self.new_tokens,
            max_completion_length=self.new_tokens,
            micro_batch=GENERATIONS,
            eval_rows=GENERATIONS,
            rollout_prompts=self.prompts,
            num_generations=GENERATIONS,
        )
        phases = forecast(self.shape, work).phases
        return {name: sum(parts.values()) for name, parts in phases.items()}


def best(work: Callable[[], object], meter: Meter) -> float:
    """Return the shortest of three times of some work, in seconds."""
    times = []
    for _ in range(4):  # the first warms up
        meter.wait()
        began = time.perf_counter()
        work()
        meter.wait()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def limits(meter: Meter, scale: int) -> tuple[float, float]:
    """Measure what the device reaches: (bytes a second in a copy, operations in a product)."""
    size = 2**30 // scale**2
    source = torch.zeros(size, dtype=torch.uint8, device=meter.device)
    into = torch.empty_like(source)
    bandwidth = 2 * size / best(lambda: into.copy_(source), meter)
    n = 8192 // scale
    left = torch.randn(n, n, device=meter.device, dtype=torch.bfloat16)
    return bandwidth, 2 * n**3 / best(lambda: left @ left, meter)


# ---- phases --------------------------------------------------------------------------------------
def sample(
    meter: Meter, name: str, policy: Policy, prompts: list[EncodedPrompt], work: Work
) -> list[list[Completion]]:
    """Sample the rollout as a phase -> completions by prompt."""
    sampling, uniform = SamplingConfig(TEMPERATURE, TOP_P, work.new_tokens), work.uniform()
    with meter.phase(name) as phase:
        groups = generate(
            policy, prompts, sampling, num_generations=GENERATIONS, uniform=uniform, keep=True
        )
    phase.moved = work.decoding_bytes()
    return groups


def sample_all(
    meter: Meter, policy: Policy, prompts: list[EncodedPrompt], work: Work
) -> list[list[Completion]]:
    """Sample without graphs and with them, where the second rollout has them all -> completions."""
    kind = meter.device.type
    with patch.dict(STEPS, {kind: replace(STEPS[kind], graphs=False)}):
        groups = sample(meter, "sampling, no graphs", policy, prompts, work)
    if STEPS[kind].graphs:
        sample(meter, "sampling, graphs captured", policy, prompts, work)
        groups = sample(meter, "sampling, graphs", policy, prompts, work)
    policy.graphs.drop()
    return groups


def sample_ragged(policy: Policy, prompts: list[EncodedPrompt], work: Work) -> None:
    """Sample where completions stop by chance and half of the prompts wait.

    Nothing of it is measured. It takes a card through what full completions do not need: rows that
    are dropped, places that are taken again, and the graphs of fewer rows. The second time all
    shapes are known.
    """
    stops = frozenset(range(0, work.shape.vocabulary, STOP_EVERY))
    policy = replace(policy, base=replace(policy.base, stop_ids=stops))
    for _ in range(2):
        generate(
            policy,
            prompts,
            SamplingConfig(TEMPERATURE, TOP_P, work.new_tokens),
            num_generations=GENERATIONS,
            max_rows=max(1, len(prompts) // 2) * GENERATIONS,
            uniform=work.uniform(),
            keep=True,
        )


def captured(policy: Policy, meter: Meter) -> str:
    """Say what became of the CUDA graphs."""
    if not STEPS[meter.device.type].graphs:
        return "none on this device"
    if policy.graphs.unable:
        return "NONE: a capture failed, and stderr says why; the rows above are without"
    return f"{policy.graphs.count} at the end"


def score(
    meter: Meter, policy: Policy, batches: list[Batch], work: Work
) -> tuple[list[Tensor], list[Tensor]]:
    """Score the rollout by the reference and by the policy -> their log-probabilities by batch."""
    name = "reference and old log-probabilities"
    with meter.phase(name) as phase, torch.no_grad(), policy.evaluating():
        old = [policy.logprobs(batch) for batch in batches]
        with policy.reference():
            reference = [policy.logprobs(batch) for batch in batches]
    phase.operations = 2 * work.operations(len(batches), 1, 1)
    return reference, old


def update(
    meter: Meter,
    policy: Policy,
    batches: list[Batch],
    scores: tuple[list[Tensor], list[Tensor]],
    work: Work,
) -> tuple[float, float]:
    """Make one optimizer step of all completions -> smallest and largest ratio before it."""
    objective, ratios = ObjectiveConfig(), []
    optimizer = build_optimizer(policy.net, learning_rate=1e-5, weight_decay=0.0)
    totals = dict(
        num_completions=work.rows,
        num_tokens=work.rows * work.new_tokens,
        max_completion_length=work.new_tokens,
    )
    policy.net.train()
    with meter.phase("update: forward and backward") as phase:
        for batch, ref, old in zip(batches, *scores, strict=True):
            mask = batch.completion_mask
            weights = token_weights(mask, objective.loss_type, **totals)
            logprobs, entropy = policy.logprobs_and_entropy(batch)
            advantages = torch.linspace(-1, 1, len(mask), device=mask.device)
            loss, terms = grpo_loss(
                logprobs, old, ref, advantages, mask, weights, objective, entropy=entropy
            )
            loss.backward()
            ratios.append(torch.stack(terms["ratio"].detach().aminmax()))
    phase.operations = work.operations(len(batches), 3, 2)
    for name in ("first optimizer step", "optimizer step"):  # the first makes AdamW's state
        with meter.phase(name):
            clip_gradients(policy.parameters, 1.0)
            whole_step(optimizer, 1e-5, 1)
    optimizer.zero_grad()
    found = torch.stack(ratios)
    return found[:, 0].min().item(), found[:, 1].max().item()


def measure(name: str, arguments: argparse.Namespace, meter: Meter) -> str:
    """Take one model through every phase, and write what was measured."""
    policy = random_policy(name, arguments.scale, meter.device)
    parameters = sum(
        one.numel() for part, one in policy.base.net.named_parameters() if "lora_" not in part
    )
    work = Work(
        model_shape(policy.base.net.config, parameters), arguments.prompts, arguments.new_tokens
    )
    meter.phases.clear()
    with meter.phase("images"):
        prompts = [random_prompt(policy) for _ in range(arguments.prompts)]
    groups = sample_all(meter, policy, prompts, work)
    sample_ragged(policy, prompts, work)
    graphs = captured(policy, meter)
    policy.graphs.drop()
    batches = list(micro_batches(prompts, groups, meter.device))
    scores = score(meter, policy, batches, work)
    sampled = torch.cat([one.logprobs for group in groups for one in group])
    scored = torch.cat([of_batch.flatten().cpu() for of_batch in scores[1]])
    smallest, largest = update(meter, policy, batches, scores, work)
    expected = work.forecast(meter.device)
    for phase in meter.phases:
        kinds = {"sampling": "rollout", "reference": "scoring", "update": "update"}
        kind = kinds.get(phase.name.split()[0].rstrip(",:"))
        phase.forecast = expected[kind] if kind else 0
    exact = "yes" if (smallest, largest) == (1.0, 1.0) else f"NO, {smallest:.6g} to {largest:.6g}"
    return "\n".join(
        [
            f"## {TITLES[name]}" + (f", divided by {arguments.scale}" * (arguments.scale > 1)),
            "",
            table(meter.phases, limits(meter, arguments.scale)),
            "",
            f"* CUDA graphs: {graphs}",
            f"* ratio exactly 1 before the first step: {exact}",
            f"* sampler against forward: {(sampled - scored).abs().mean():.2g} nats a token",
            *hours(meter.phases, work),
            "",
        ]
    )


def table(phases: list[Phase], reached: tuple[float, float]) -> str:
    """Write the phases in Markdown."""
    lines = [
        f"Reached in a copy: {reached[0] / 1e9:,.0f} GB/s; in a product: {reached[1] / 1e12:,.2f}"
        " TFLOP/s.",
        "",
        "| phase | s | peak GiB | forecast GiB | of the bandwidth | of the FLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for phase in phases:
        cells = [
            f"{phase.seconds:.3f}",
            f"{phase.peak / GIB:.2f}" if phase.peak else "",
            f"{phase.forecast / GIB:.2f}" if phase.forecast else "",
            f"{phase.moved / phase.seconds / reached[0]:.0%}" if phase.moved else "",
            f"{phase.operations / phase.seconds / reached[1]:.0%}" if phase.operations else "",
        ]
        lines.append(f"| {phase.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hours(phases: list[Phase], work: Work) -> list[str]:
    """Write tokens a second, and how long the paper's images would take.

    An epoch of SFT on 2,000 images has an answer of a completion's length each, in forwards as the
    update's, of a quarter of its completions. GRPO on 1,000 images samples, scores and updates.
    """
    seconds = {phase.name: phase.seconds for phase in phases}
    sampling = min(value for name, value in seconds.items() if name.startswith("sampling"))
    update, image = seconds["update: forward and backward"], seconds["images"] / work.prompts
    tokens = PROMPT_TOKENS + work.new_tokens
    packed = PROMPT_TOKENS + GENERATIONS * work.new_tokens
    sft = SFT_IMAGES * (image + update / work.prompts * tokens / packed)
    rest = seconds["reference and old log-probabilities"] + update + 2 * seconds["optimizer step"]
    grpo = GRPO_IMAGES * (image + (sampling + rest) / work.prompts)
    return [
        f"* {work.rows * work.new_tokens / sampling:,.0f} tokens a second while sampling",
        f"* {SFT_IMAGES:,} images of SFT: {sft / 3600:.2f} h; {GRPO_IMAGES:,} of GRPO:"
        f" {grpo / 3600:.2f} h (without evaluations and saves)",
    ]


def machine(device: torch.device) -> str:
    """Name the device and the versions, and those that the package asks for."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    asked = [line for line in setup["options"]["install_requires"].split("\n") if line]
    asked = [line for line in asked if line.split()[0] in ("torch", "transformers", "peft")]
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    installed = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{device.type}: {card}; {installed} (setup.cfg: {', '.join(asked)})"


def main(argv: list[str] | None = None) -> int:
    """Measure the models, print their tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument(
        "--prompts", type=int, default=16, help="of the rollout, with 4 completions"
    )
    parser.add_argument("--new_tokens", type=int, default=512, help="of a completion")
    parser.add_argument("--scale", type=int, default=1, help="divides widths, heads and layers")
    arguments = parser.parse_args(argv)
    if min(arguments.prompts, arguments.scale) < 1 or arguments.new_tokens < 2:
        parser.error("--prompts and --scale take 1 or more, --new_tokens 2 or more")
    if not torch.cuda.is_available() and arguments.scale == 1:
        parser.error(
            "no CUDA device is there; the full sizes need one. Rehearse on this machine with"
            " --scale 16 --prompts 1 --new_tokens 3"
        )
    device = pick_device()  # which sets up the allocator and TF32 as a run does
    print(machine(device), end="\n\n")
    for name in arguments.models:
        print(measure(name, arguments, Meter(device)), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
