"""Measure what a phase allocates on a small model of any family, and forecast the same.

tests/benchmarks/memory_forecast.py prints both. tests/engine/test_memory.py compares them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from engine.attention import IMPLEMENTATION
from engine.collate import collate_rows
from engine.completion import SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import family_of
from engine.generate import generate
from engine.logprobs import token_logprobs
from engine.memory import ModelShape, Workload, forecast, model_shape
from engine.model import BaseModel, attach_new_adapter, enable_gradient_checkpointing
from engine.optim import build_optimizer, whole_step
from engine.policy import Policy
from tests.helpers.tiny import policy_of, uniform_for

CLASSES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "gemma3": Gemma3ForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = (
    "sft",
    "sft-checkpointed",
    "grpo",
    "grpo-checkpointed",
    "scoring",
    "rollout",
    "evaluation",
)

IMAGE_ID, VISION_START = 5, 3


@dataclass(frozen=True)
class Sizes:
    """Describe a small model and its batches."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 3
    heads: int = 8
    vocabulary: int = 4096
    image_tokens: int = 256  # a square number
    prompt_length: int = 577
    new_tokens: int = 256
    rows: int = 4  # of a micro-batch, and prompts of a rollout
    generations: int = 4


def model_config(family: str, sizes: Sizes) -> PretrainedConfig:
    """Make the configuration of a real class: 2 KV heads, a small vision tower with four patches a
    visual token.
    """
    head_dim = sizes.hidden // sizes.heads
    text = dict(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    vision = dict(hidden_size=sizes.hidden // 2, intermediate_size=sizes.intermediate // 2)
    if family == "gemma3":
        layers = ["sliding_attention"] * (sizes.layers - 1) + ["full_attention"]
        return Gemma3Config(
            text_config=text
            | dict(
                head_dim=head_dim,
                sliding_window=sizes.prompt_length // 2,
                query_pre_attn_scalar=head_dim,
                layer_types=layers,
                pad_token_id=0,
            ),
            vision_config=vision
            | dict(
                num_hidden_layers=2,
                num_attention_heads=4,
                patch_size=14,
                image_size=28 * int(sizes.image_tokens**0.5),
            ),
            mm_tokens_per_image=sizes.image_tokens,
            image_token_index=IMAGE_ID,
            boi_token_index=6,
            eoi_token_index=7,
        )
    sections = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    is_qwen3 = family == "qwen3_vl"
    own_text = dict(head_dim=head_dim) if is_qwen3 else dict(tie_word_embeddings=True)
    own_vision = (
        # as in the real ones: the first three layers get deepstack features
        dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=[0, 1, 2])
        if is_qwen3
        else dict(patch_size=14, window_size=112, fullatt_block_indexes=[1])
    )
    return (Qwen3VLConfig if is_qwen3 else Qwen2_5_VLConfig)(
        text_config=text
        | own_text
        | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections)),
        vision_config=vision
        | own_vision
        | dict(
            depth=3 if is_qwen3 else 2,
            num_heads=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=sizes.hidden,
        ),
        image_token_id=IMAGE_ID,
        video_token_id=6,
        vision_start_token_id=VISION_START,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    )


def load(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """Make a random model as engine.model.load_model returns it, without a tokenizer.

    It has no stop ids, so that completions are full.
    """
    torch.manual_seed(0)
    base = (
        CLASSES[config.model_type]
        ._from_config(
            config, dtype=dtype, attn_implementation={"": "sdpa", "text_config": IMPLEMENTATION}
        )
        .requires_grad_(False)
        .to(device)
        .eval()
    )
    return BaseModel(
        "random",
        base,
        family_of(config.model_type),
        SimpleNamespace(pad_token_id=0),
        frozenset(),
        (),
        None,
    )


def make_prompt(config: PretrainedConfig, sizes: Sizes) -> EncodedPrompt:
    ids = torch.randint(100, sizes.vocabulary, (sizes.prompt_length,))
    ids[9], ids[10 : 10 + sizes.image_tokens] = VISION_START, IMAGE_ID
    side = 2 * int(sizes.image_tokens**0.5)  # patches
    if config.model_type == "gemma3":
        vision = {"pixel_values": torch.randn(1, 3, 14 * side, 14 * side)}
    else:
        vision = {
            "pixel_values": torch.randn(side * side, 6 * config.vision_config.patch_size**2),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
    return EncodedPrompt(ids, (ids == IMAGE_ID).long(), vision)


def workload(phase: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Workload:
    sft = phase.startswith("sft")
    return Workload(
        element_size=dtype.itemsize,
        device=device.type,
        lora_r=16,
        lora_dropout=0.1 if sft else 0.0,
        adapters=1 if sft else 2,
        gradient_checkpointing="checkpointed" in phase,
        prompt_length=sizes.prompt_length,
        image_tokens=sizes.image_tokens,
        completion_length=sizes.new_tokens,
        max_completion_length=sizes.new_tokens,
        micro_batch=sizes.rows,
        eval_rows=sizes.rows,
        rollout_prompts=0 if sft else sizes.rows,
        num_generations=1 if sft else sizes.generations,
    )


def expected_bytes(model: ModelShape, phase: str, work: Workload) -> int:
    """Forecast what a phase takes over the loaded model, in bytes: without what stands there before
    it begins.
    """
    name = "update" if phase.startswith(("sft", "grpo")) else phase
    parts = forecast(model, work).phases[name]
    return sum(size for part, size in parts.items() if part not in ("base", "adapters", "AdamW"))


def phase_step(
    phase: str,
    sizes: Sizes,
    config: PretrainedConfig,
    policy: Policy,
    device: torch.device,
) -> Callable[[], None]:
    """Make the code of one phase, as the loops of run_sft.py and run_grpo.py have it.

    Batches are made inside. GRPO's updates get the prompts with features from the rollout.
    """

    @torch.no_grad()
    def look(prompt: EncodedPrompt) -> EncodedPrompt:
        pixels = {name: tensor.to(device) for name, tensor in prompt.vision.items()}
        seen = policy.family.embed_image(policy.base.net, pixels)
        return replace(
            prompt,
            vision={name: tensor.cpu() for name, tensor in seen.items()}
            | {name: tensor for name, tensor in prompt.vision.items() if name != "pixel_values"},
        )

    of_rollout = [
        look(make_prompt(config, sizes)) for _ in range(-(-sizes.rows // sizes.generations))
    ]

    def batch(generations: int):
        prompts = (
            of_rollout
            if generations > 1
            else [look(make_prompt(config, sizes)) for _ in range(sizes.rows)]
        )
        rows = [
            EncodedRow(
                prompts[i // generations],
                torch.randint(100, sizes.vocabulary, (sizes.new_tokens,)),
                torch.ones(sizes.new_tokens, dtype=torch.bool),
            )
            for i in range(sizes.rows)
        ]
        return collate_rows(rows, 0).to(device)

    optimizer = build_optimizer(policy.net, learning_rate=1e-3, weight_decay=0.0)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # its moments stand there before the phase begins
    optimizer.zero_grad()

    def sft() -> None:
        held = batch(1)  # to the end of the step, as in the loop
        hidden, targets = policy.hidden_states(held)
        logprobs, _ = token_logprobs(hidden, policy.head, targets, softcap=policy.softcap)
        (-logprobs.sum()).backward()
        whole_step(optimizer, 1e-3, 1)

    def grpo() -> None:
        held = batch(sizes.generations)
        logprobs, _ = policy.logprobs_and_entropy(held)
        logprobs.sum().backward()
        whole_step(optimizer, 1e-3, 1)

    @torch.no_grad()
    def scoring() -> None:
        policy.logprobs(batch(sizes.generations))

    def decode(temperature: float, generations: int) -> Callable[[], None]:
        sampling = SamplingConfig(temperature, 0.95, sizes.new_tokens)
        return lambda: generate(
            policy,
            [look(make_prompt(config, sizes)) for _ in range(sizes.rows)],
            sampling,
            num_generations=generations,
            uniform=uniform_for(sizes.rows, generations, sizes.new_tokens),
        )

    policy.net.train(phase.startswith(("sft", "grpo")))
    steps = {
        "sft": sft,
        "grpo": grpo,
        "scoring": scoring,
        "rollout": decode(0.8, sizes.generations),
        "evaluation": decode(0.0, 1),
    }
    return steps[phase.removesuffix("-checkpointed")]


def prepare(
    family: str, phase: str, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], int]:
    """Return the phase's code, and the bytes that the forecast gives it over the loaded model."""
    config = model_config(family, sizes)
    model = load(config, dtype, device)
    shape = model_shape(config, sum(parameter.numel() for parameter in model.net.parameters()))
    work = workload(phase, sizes, dtype, device)
    net = attach_new_adapter(model, r=work.lora_r, alpha=32, dropout=work.lora_dropout)
    if work.gradient_checkpointing:
        enable_gradient_checkpointing(net)
    policy = policy_of(net, model, temperature=0.8)
    return phase_step(phase, sizes, config, policy, device), expected_bytes(shape, phase, work)


def allocated_peak(step: Callable[[], None], device: torch.device) -> int:
    """Measure the bytes of tensors and kernels' buffers that `step` holds at most at once, over
    what is there before it.
    """
    gc.collect()  # what earlier measurements left must not be freed within this one
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    return profiled_peak(profile)


def profiled_peak(profile: torch.profiler.profile) -> int:
    """Read the bytes that torch's CPU allocator held at most over those at the profile's beginning.

    The profile must have `profile_memory`.
    """
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def resident(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes (Linux)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024
