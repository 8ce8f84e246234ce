"""Describe what a run does with its model at its largest, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForImageTextToText

from data.examples import Example
from data.prompts import Prompt
from engine.adapter_files import read_adapter
from engine.config import UsageError
from engine.device import base_dtype
from engine.encode import EncodedPrompt, Encoder
from engine.memory import ModelShape, Workload, model_shape
from engine.model_files import model_path
from engine.out_of_memory import SAMPLING
from engine.processor_files import parsed_config

ROWS = 8  # rows of a data set whose lengths stand for all: of answers to learn the longest


class Plan(Protocol):
    """Describe how the completions of a rollout relate, which engine does not know."""

    @property
    def own_prompts(self) -> int: ...
    @property
    def group(self) -> int: ...
    def problems(self) -> list[str]: ...


@dataclass(frozen=True)
class Lengths:
    """Hold the lengths, in tokens, of the longest rows that were looked at.

    text: of a prompt without its image. image: of an image. answer: of an answer to learn.
    """

    text: int
    image: int
    answer: int


def shape_of(name: str) -> ModelShape | None:
    """Read the sizes of a checkpoint from its config.json, with its parameters on no device.

    Returns None for a configuration that no model can be made of: what loads it says so.
    """
    try:
        config = parsed_config(model_path(name))
        with torch.device("meta"):
            net = AutoModelForImageTextToText.from_config(config)
        net.tie_weights()
        return model_shape(config, sum(parameter.numel() for parameter in net.parameters()))
    except Exception:  # transformers raises errors of any kind on a damaged configuration
        return None


def lengths_of(
    encoder: Encoder,
    prompt: Prompt,
    learned: Sequence[Example],
    asked: Iterable[Sequence[Example]],
) -> Lengths | None:
    """Encode the rows of `learned` with the longest answers and some of every set of `asked`.

    prompt: the instruction. Rows that cannot be encoded are passed over, since the run
    itself names them. Returns None where there is no other.
    """
    prompts: list[EncodedPrompt] = []
    answers = [0]
    longest = sorted(learned, key=lambda example: -len(example.answer or ""))[:ROWS]
    rows = [*longest, *(example for examples in asked for example in examples[:ROWS])]
    for place, example in enumerate(rows):
        try:
            if place < len(longest) and example.answer is not None:
                row = encoder.encode_answer(example, prompt, example.answer)
                answers.append(len(row.completion_ids))
                prompts.append(row.prompt)
            else:
                prompts.append(encoder.encode_prompt(example, prompt))
        except ValueError:  # a DataError, or a chat template without a place for the image
            continue
    if not prompts:
        return None
    images = [int(encoded.token_types.sum()) for encoded in prompts]
    texts = [len(encoded.input_ids) - image for encoded, image in zip(prompts, images, strict=True)]
    return Lengths(max(texts), max(images), max(answers))


def rank_of(adapter: str | Path | None, config: Any) -> int:
    """Read the largest rank of a folder's adapter, or of the fresh one of the settings.

    Returns 0 where the folder does not tell, since what loads the adapter says what is wrong.
    """
    if adapter is None:
        return getattr(config, "lora_r", 0)
    try:
        return read_adapter(adapter).largest_rank
    except UsageError:
        return 0


def image_tokens(config: Any, shape: ModelShape, lengths: Lengths) -> int:
    """Count the tokens of the largest image under the bound of the settings, where it has one."""
    return lengths.image if shape.fixed_images else min(lengths.image, config.max_visual_tokens)


def training_work(
    config: Any,
    shape: ModelShape,
    lengths: Lengths,
    device: torch.device,
    rank: int,
    plan: Plan | None,
    shards: int = 1,
) -> Workload:
    """Describe what a training run does with the model on one GPU, at its largest.

    rank: of the adapter. plan: of the rollouts, None in SFT. shards: GPUs that share the base.
    """
    image = image_tokens(config, shape, lengths)
    return Workload(
        element_size=base_dtype(config.bf16, device).itemsize,
        device=device.type,
        lora_r=rank,
        lora_dropout=0.0 if plan else config.lora_dropout,
        adapters=2 if plan else 1,
        gradient_checkpointing=config.gradient_checkpointing,
        prompt_length=lengths.text + image,
        image_tokens=image,
        completion_length=config.max_completion_length if plan else lengths.answer,
        max_completion_length=config.max_completion_length,
        micro_batch=config.per_device_train_batch_size,
        eval_rows=config.per_device_eval_batch_size,
        rollout_prompts=max(1, plan.own_prompts) if plan else 0,
        num_generations=plan.group if plan else 1,
        max_tokens_per_forward=config.max_tokens_per_forward,
        sampling_copies=config.sampling_copies,
        # a server decodes the rollouts: here they take the room of one completion
        sampling_rows=1 if getattr(config, "use_vllm", False) else getattr(config, SAMPLING, None),
        shards=shards,
        eval_sampled=getattr(config, "vote_baseline", False),
    )


def shards_of(config: Any, local_size: int) -> int:
    """Count the ranks that share the base, 1 where each has all of it. local_size: of a node."""
    return local_size if getattr(config, "shard_base", False) else 1
