"""The settings that run_sft.py and run_grpo.py share: one flat dataclass, whose fields are flags of
both.

The defaults are the paper's where it gives them; each field's `source` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.answers import ANSWER_FORMATS
from data.prompts import PROMPTS
from engine.config import ConfigError, Resolved, UsageError, setting
from engine.model import LoadedModel, adapter_config, load_model
from engine.run import saved_settings
from engine.runtime import base_dtype

# Of a run that neither names them nor continues one that did.
FALLBACKS = {"prompt": "free_reasoning", "min_visual_tokens": 256, "max_visual_tokens": 512}
BadImages = Literal["fail", "skip"]
PAPER_SFT, PAPER_GRPO, OURS, ENGINE = (
    "paper 3.2.1 (SFT)",
    "paper 3.2.2 (GRPO)",
    "not published",
    "no part of the method",
)


@dataclass(frozen=True)
class TrainingConfig:
    """Model, data, batches, optimizer, precision, logging and checkpoints."""

    model_name_or_path: str | None = setting(
        None,
        "base model: a checkpoint's folder, a hub name, or 'demo' or 'demo-gemma', which are"
        " embedded",
        unset="the recipe's; GRPO: the SFT adapter's",
        group="model and data",
    )
    train_file: str | None = setting(
        None,
        "training data, JSONL with one example a line; demo:SPLIT is a split of the embedded demo",
        unset="the recipe's",
        group="model and data",
    )
    validation_file: tuple[str, ...] = setting(
        (),
        "NAME=FILE, repeatable: a data set to evaluate on during training",
        group="model and data",
    )
    image_root: str | None = setting(
        None,
        "folder that image paths are relative to",
        unset="each data file's own folder",
        group="model and data",
    )
    bad_images: BadImages = setting(
        "fail",
        "an unreadable image stops the run; or skip: all images are read before the start, and the"
        " examples of bad ones are left out and listed in bad-images-<name>.jsonl",
        source=ENGINE,
        group="model and data",
    )
    prompt: str | None = setting(
        None,
        f"instruction variant: {', '.join(PROMPTS)}",
        unset="free_reasoning; GRPO: the SFT run's",
        group="model and data",
    )
    answer_format: str | None = setting(
        None,
        f"form of a valid answer: {', '.join(ANSWER_FORMATS)}",
        unset="the prompt's own; GRPO: the SFT run's",
        group="model and data",
    )
    min_visual_tokens: int | None = setting(
        None,
        "an image is enlarged to at least this many visual tokens; Gemma 3 has a fixed number",
        unset="256; GRPO: the SFT run's",
        unit="tokens",
        source=PAPER_SFT,
        group="model and data",
    )
    max_visual_tokens: int | None = setting(
        None,
        "an image is reduced to at most this many visual tokens",
        unset="512; GRPO: the SFT run's",
        unit="tokens",
        source=PAPER_SFT,
        group="model and data",
    )

    learning_rate: float = setting(
        5e-5, "peak learning rate of AdamW", source=PAPER_SFT, group="optimization"
    )
    num_train_epochs: float = setting(
        6.0, "passes over the training data", unit="epochs", source=PAPER_SFT, group="optimization"
    )
    max_steps: int | None = setting(
        None,
        "stop after this many steps instead of by epochs",
        unset="by epochs",
        unit="optimizer steps",
        group="optimization",
    )
    per_device_train_batch_size: int = setting(
        1,
        "sequences (GRPO: completions) in a micro-batch",
        unit="sequences",
        source=PAPER_SFT,
        group="optimization",
    )
    per_device_eval_batch_size: int = setting(
        8,
        "sequences decoded or scored together in evaluation; changes no result",
        unit="sequences",
        source=ENGINE,
        group="optimization",
    )
    gradient_accumulation_steps: int = setting(
        8,
        "micro-batches in an optimizer step",
        unit="micro-batches",
        source=PAPER_SFT,
        group="optimization",
    )
    warmup_ratio: float = setting(
        0.05,
        "share of all steps with rising learning rate, before the cosine",
        source=PAPER_SFT,
        group="optimization",
    )
    weight_decay: float = setting(
        0.01, "AdamW's decoupled weight decay", source=PAPER_SFT, group="optimization"
    )
    max_grad_norm: float = setting(
        5.0, "global L2 norm at which gradients are clipped", source=PAPER_SFT, group="optimization"
    )
    seed: int = setting(
        42, "seed of data order, dropout and sampling", source=OURS, group="optimization"
    )

    max_tokens_per_forward: int | None = setting(
        8192,
        "most tokens that one forward of training or scoring runs, each prompt counted once;"
        " micro-batches that cost more are cut, which changes no gradient; none for no bound",
        unit="tokens",
        source=ENGINE,
        group="memory",
    )
    vision_cache_gb: float = setting(
        4.0,
        "host memory for the image features of the frozen vision tower, which runs once for each"
        " image that fits",
        unit="GB",
        source=ENGINE,
        group="memory",
    )
    vision_cache_dir: str | None = setting(
        None,
        "folder that keeps image features across runs as well, by tower, processor and image; only"
        " ever grows",
        unset="memory only",
        source=ENGINE,
        group="memory",
    )
    bf16: bool = setting(
        True,
        "base model in bfloat16; adapters, their gradients and AdamW's state stay fp32",
        source=PAPER_SFT,
        group="memory",
    )
    gradient_checkpointing: bool = setting(
        True,
        "recompute decoder layers in the backward pass: less memory, about a third more time",
        source=PAPER_SFT,
        group="memory",
    )
    compile: bool = setting(
        False,
        "let torch compile what decoder layers do with single tokens, in training and scoring, not"
        " in sampling; needs a C++ compiler and, on a GPU, Triton; results differ by rounding from"
        " those without",
        source=ENGINE,
        group="memory",
    )

    max_completion_length: int = setting(
        512,
        "longest completion that is sampled or decoded",
        unit="tokens",
        source=OURS,
        group="decoding",
    )

    show_batch: bool = setting(
        False,
        "print the first batch token by token (SFT: a micro-batch; GRPO: a rollout's prompts) and"
        " stop; loads no weights",
        source=ENGINE,
        group="run",
    )
    dry_run: bool = setting(
        False,
        "build everything, check the first images, print token lengths and a memory forecast by"
        " part, and stop; trains and writes nothing (the demo's images are drawn as usual)",
        source=ENGINE,
        group="run",
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of torch; one is fastest for a tiny model beside other work",
        unset="torch's own choice",
        unit="threads",
        group="run",
    )
    output_dir: str | None = setting(
        None, "run folder", unset="runs/<time>-sft or -grpo under the current folder", group="run"
    )
    logging_steps: int = setting(
        1,
        "metrics are logged every so many steps, and at the last",
        unit="optimizer steps",
        source=ENGINE,
        group="run",
    )
    save_steps: int | None = setting(
        None,
        "a checkpoint every so many steps, beside those at every evaluation",
        unset="only those",
        unit="optimizer steps",
        group="run",
    )
    save_total_limit: int | None = setting(
        3,
        "checkpoints to keep, or none for all; the best and the last are never deleted",
        unit="checkpoints",
        source=ENGINE,
        group="run",
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "a checkpoint-<step> folder, or a run folder for its newest sound checkpoint; settings that"
        " are not given as flags are those of that run",
        unset="a new run",
        group="run",
    )


def training_problems(config: TrainingConfig) -> list[str]:
    """What is wrong with the shared settings, one line each: ranges, and names that do not exist."""
    positive = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "max_completion_length",
        "logging_steps",
        "learning_rate",
        "max_grad_norm",
        "num_train_epochs",
    )
    optional = (
        "max_steps",
        "save_steps",
        "save_total_limit",
        "min_visual_tokens",
        "max_visual_tokens",
        "num_threads",
        "max_tokens_per_forward",
    )
    problems = [
        f"--{name} is {getattr(config, name)}; it must be positive"
        for name in positive
        if not getattr(config, name) > 0
    ]
    problems += [
        f"--{name} is {getattr(config, name)}; it must be positive"
        for name in optional
        if getattr(config, name) is not None and not getattr(config, name) > 0
    ]
    if not config.vision_cache_gb >= 0:
        problems.append(
            f"--vision_cache_gb is {config.vision_cache_gb}; it must not be negative (0 keeps"
            " nothing)"
        )
    if config.show_batch and config.dry_run:
        problems.append("--show_batch and --dry_run each stop the run; give one of them")
    if not 0 <= config.warmup_ratio < 1:
        problems.append(f"--warmup_ratio is {config.warmup_ratio}; it must lie in [0, 1)")
    if config.weight_decay < 0:
        problems.append(f"--weight_decay is {config.weight_decay}; it must not be negative")
    if config.prompt is not None and config.prompt not in PROMPTS:
        problems.append(
            f"--prompt {config.prompt}: no such instruction variant; there are {', '.join(PROMPTS)}"
        )
    if config.answer_format not in (None, *ANSWER_FORMATS):
        problems.append(
            f"--answer_format {config.answer_format}: no such form; there are"
            f" {', '.join(ANSWER_FORMATS)}"
        )
    if (config.min_visual_tokens or 0) > (config.max_visual_tokens or float("inf")):
        problems.append(
            f"--min_visual_tokens {config.min_visual_tokens} is above --max_visual_tokens"
            f" {config.max_visual_tokens}"
        )
    names = ["train"]  # the training file's name in config.json
    for entry in config.validation_file:
        name, separator, file = entry.partition("=")
        if not separator or not name or not file or not all(c.isalnum() or c in "-_" for c in name):
            problems.append(
                f"--validation_file {entry}: write NAME=FILE, with a name of letters, digits, -"
                " and _"
            )
        names.append(name)
    problems += [
        f"--validation_file: the name {name!r} is taken; choose another"
        for name in sorted({n for n in names if names.count(n) > 1})
    ]
    return problems


def load_base(config: TrainingConfig, device: torch.device) -> LoadedModel:
    """The base model that a run is configured to train."""
    return load_model(
        config.model_name_or_path,
        dtype=base_dtype(config.bf16, device),
        device=device,
        min_visual_tokens=config.min_visual_tokens,
        max_visual_tokens=config.max_visual_tokens,
        vision_cache_gb=config.vision_cache_gb,
        vision_cache_dir=config.vision_cache_dir,
    )


def from_adapter(resolved: Resolved) -> Resolved:
    """Fill in what was not given from the adapter that training starts from: its base model, and
    the prompt, answer format and image size of the run that made it.

    Raises UsageError where the folder holds no adapter, or one of another base than a recipe names.
    """
    config: TrainingConfig = resolved.configs[0]
    folder = Path(config.adapter_name_or_path)
    base = adapter_config(folder).base_model_name_or_path
    if config.model_name_or_path is None or resolved.origins["model_name_or_path"].startswith(
        "recipe"
    ):
        if config.model_name_or_path not in (None, base):
            raise UsageError(
                f"{folder} was trained on {base}, not on {config.model_name_or_path}"
                f" ({resolved.origins['model_name_or_path']}); give --model_name_or_path, or"
                " another --adapter_name_or_path"
            )
        resolved = resolved.with_value("model_name_or_path", base, "adapter")
    saved = saved_settings(folder)
    for name, default in FALLBACKS.items():
        if getattr(config, name) is None:
            resolved = resolved.with_value(
                name, saved.get(name) or default, "adapter's run" if name in saved else "default"
            )
    if resolved.configs[0].answer_format is None:
        prompt = resolved.configs[0].prompt
        # another prompt asks for its own form
        learned = saved.get("answer_format") if prompt == saved.get("prompt") else None
        resolved = resolved.with_value(
            "answer_format",
            learned or PROMPTS[prompt].answer_format,
            "adapter's run" if learned else "prompt",
        )
    found = training_problems(resolved.configs[0])
    if found:
        raise ConfigError(found)
    return resolved
