"""Declare the settings that run_sft.py and run_grpo.py share, and those of run_sft.py alone.

Each is a field of a flat dataclass and becomes a flag by itself. The defaults are the paper's where
it gives them, and each field's `source` says so. A value is known, never None, where something
decides it later: the default stands there until then, and `Resolved.origins` tells that it was not
given. Nothing here loads torch before a command line is accepted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from data.answers import ANSWER_FORMATS
from data.examples import check_data_files
from data.files import DataError, KeptFile, NameOrFile, named_files
from data.hospitals import hospital_weights, train_files
from data.label_sets import labels_of
from data.labels import LabelSet
from data.prompt_files import prompt_of, prompt_problems
from data.prompts import PROMPTS, Prompt
from data.sets import TRAIN, train_specs
from engine.config import (
    Changes,
    ConfigError,
    Resolved,
    Resuming,
    parse_config,
    range_problems,
    setting,
)
from engine.inherited import INHERITED, inherit
from engine.launch import Launch
from engine.longer import LENGTHS
from engine.model_files import check_model_folder
from engine.resume import (
    FREE_TO_CHANGE,
    inherited_settings,
    record_of,
    resumed_folder,
    with_memory_cuts,
)
from engine.run_batch import BATCH_SETTINGS, recomputed_line, settled_batch
from engine.runtime import check_lock, check_output_dir, check_writable
from engine.unfinished import placed, unfinished_run

# Sampling as in the rollouts of the paper; its greatest length is not published.
TEMPERATURE, TOP_P, MAX_COMPLETION_LENGTH = 0.8, 0.95, 512
# What an evaluation measures on each validation set, as a run logs it (eval/scores.py).
EVALUATED_METRICS = (
    "macro_f1",
    "micro_f1",
    "jaccard",
    "fail_rate",
    "invalid_rate",
    "unknown_rate",
    "no_label_rate",
    "completion_length",
    "silenced_labels",
)
BadImages = Literal["fail", "skip"]
Scheduler = Literal["cosine", "linear", "constant_with_warmup", "constant"]  # transformers' names
LABEL_FILE_HELP = (
    "labels of one's own in place of the 14, a text file with one a line: 'NAME | alias | alias',"
    " the one that excludes the others as 'exclusive: NAME' (data/README.md)"
)
PROMPT_HELP = f"instruction: {', '.join(PROMPTS)}; or one's own, a .toml file (data/README.md)"
PAPER_SFT, PAPER_GRPO, OURS, ENGINE = (
    "paper 3.2.1 (SFT)",
    "paper 3.2.2 (GRPO)",
    "not published",
    "no part of the method",
)
# Intervals of numbers. Counts end where nothing larger makes sense, so that a slip is told.
POSITIVE, COUNT, ROWS, SIZE = "(0, inf)", "[1, 1000000000]", "[1, 65536]", "[1, 1000000]"
SEED, THREADS = "[0, 4294967295]", "[1, 4096]"  # numpy's seeds have 32 bits
COPIES_HELP = (
    "sample from copies of the decoder's weights with the adapter added, in float32 only, on a CPU"
    " laid out for faster products; without them the adapter stays beside: slower, the same"
    " completions but for rounding"
)
TF32_HELP = (
    "on a GPU, make float32 products in TF32, with operands of 10 bits behind the point in place of"
    " 23: faster, and every number differs by rounding from float32's; a bfloat16 base leaves few"
    " such products"
)
EVAL_BATCH_UNSET = (
    "as many as the memory forecast allows, up to 128; 8 where nobody knows what is free"
)
SamplingProduct = Literal["auto", "torch", "onednn"]
PRODUCT_HELP = (
    "products of the sampler's layers, in float32 on a CPU: torch's, oneDNN's, or auto, which"
    " measures both for a moment at the start; the same completions but for rounding"
)
CHECK_HELP = (
    "compare the memory forecast with what is free, before weights are read, and refuse a run that"
    " cannot fit"
)


@dataclass(frozen=True)
class TrainingConfig:
    """Hold the settings of both scripts: model, data, batches, optimizer, memory, checkpoints."""

    model_name_or_path: str = setting(
        "",
        "base model: a checkpoint's folder, a hub name, or 'demo' or 'demo-gemma', which are"
        " embedded",
        unset="the recipe's; GRPO: the SFT adapter's",
        group="model and data",
    )
    train_file: tuple[str, ...] = setting(
        (),
        "training data, JSONL with one example a line; demo:SPLIT is a split of the embedded demo."
        " Of several hospitals NAME=FILE, repeatable, each image once an epoch, or"
        " NAME=FILE@WEIGHT, as often as the weights say",
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
    label_file: KeptFile | None = setting(
        None,
        LABEL_FILE_HELP,
        unset="CheXpert's 14 labels; GRPO: the SFT run's",
        group="model and data",
    )
    prompt: NameOrFile = setting(
        "free_reasoning",
        PROMPT_HELP,
        unset="free_reasoning; GRPO: the SFT run's",
        group="model and data",
    )
    answer_format: str = setting(
        "think_solution",
        f"form of a valid answer: {', '.join(ANSWER_FORMATS)}",
        unset="the prompt's own; GRPO: the SFT run's",
        group="model and data",
    )
    min_visual_tokens: int = setting(
        256,
        "an image is enlarged to at least this many visual tokens; Gemma 3 has a fixed number",
        unset="256; GRPO: the SFT run's",
        unit="tokens",
        source=PAPER_SFT,
        group="model and data",
        within=SIZE,
    )
    max_visual_tokens: int = setting(
        512,
        "an image is reduced to at most this many visual tokens",
        unset="512; GRPO: the SFT run's",
        unit="tokens",
        source=PAPER_SFT,
        group="model and data",
        within=SIZE,
    )

    lora_r: int = setting(
        16,
        "rank of the LoRA matrices of a fresh adapter; others have their own",
        source=PAPER_SFT,
        group="adapter",
        within=ROWS,
    )
    lora_alpha: float = setting(
        32.0,
        "LoRA scaling of a fresh adapter: the update is multiplied by alpha / r",
        source=PAPER_SFT,
        group="adapter",
        within="(0, 1000000]",
    )

    learning_rate: float = setting(
        5e-5,
        "peak learning rate of AdamW",
        source=PAPER_SFT,
        group="optimization",
        within=POSITIVE,
    )
    num_train_epochs: float = setting(
        6.0,
        "passes over the training data",
        unit="epochs",
        source=PAPER_SFT,
        group="optimization",
        within="(0, 1000000]",
    )
    max_steps: int | None = setting(
        None,
        "stop after this many steps instead of by epochs",
        unset="by epochs",
        unit="optimizer steps",
        group="optimization",
        within=COUNT,
    )
    per_device_train_batch_size: int = setting(
        1,
        "sequences (GRPO: completions) in a micro-batch",
        unit="sequences",
        source=PAPER_SFT,
        group="optimization",
        within=ROWS,
    )
    per_device_eval_batch_size: int = setting(
        8,
        "sequences decoded or scored together in evaluation; changes results by rounding at most;"
        " halved where memory runs out",
        unset=EVAL_BATCH_UNSET,
        unit="sequences",
        source=ENGINE,
        group="optimization",
        within=ROWS,
    )
    gradient_accumulation_steps: int = setting(
        8,
        "micro-batches in an optimizer step, of each rank where there are several",
        unit="micro-batches",
        source=PAPER_SFT,
        group="optimization",
        within=ROWS,
    )
    lr_scheduler_type: Scheduler = setting(
        "cosine",
        "course of the learning rate after the warm-up: half a cosine or a line down to 0 at the"
        " last step, or none (constant_with_warmup); constant has no warm-up either",
        source="not published; the name as in transformers",
        group="optimization",
    )
    warmup_ratio: float = setting(
        0.05,
        "share of all steps with rising learning rate, before --lr_scheduler_type",
        source=PAPER_SFT,
        group="optimization",
        within="[0, 1)",
    )
    weight_decay: float = setting(
        0.01,
        "AdamW's decoupled weight decay",
        source=PAPER_SFT,
        group="optimization",
        within="[0, inf)",
    )
    max_grad_norm: float = setting(
        5.0,
        "global L2 norm at which gradients are clipped",
        source=PAPER_SFT,
        group="optimization",
        within=POSITIVE,
    )
    max_bad_steps: int = setting(
        0,
        "skip up to so many steps in a row whose gradient or loss is not finite; the next one ends"
        " the run. A skipped step counts as a step and changes no weights",
        unit="optimizer steps",
        source=ENGINE,
        group="optimization",
        within="[0, 1000000000]",
    )
    seed: int = setting(
        42,
        "seed of data order, dropout and sampling",
        source=OURS,
        group="optimization",
        within=SEED,
    )

    max_tokens_per_forward: int | None = setting(
        8192,
        "most tokens that one forward of training or scoring runs, each prompt counted once;"
        " micro-batches that cost more are cut, which changes no gradient; none for no bound; where"
        " memory runs out it is halved for the rest of the run, down to a row at a time",
        unit="tokens",
        source=ENGINE,
        group="memory",
        within=COUNT,
    )
    vision_cache_gb: float = setting(
        4.0,
        "host memory for the image features of the frozen vision tower, which runs once for each"
        " image that fits",
        unit="GB",
        source=ENGINE,
        group="memory",
        within="[0, 1000000]",
    )
    base_hash: Literal["sample", "full"] = setting(
        "sample",
        "how the base's weights are hashed into config.json, so that others under the same path are"
        " noticed: headers, sizes and 16 MiB of each file, or all of them (reads every byte)",
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
    sampling_copies: bool = setting(
        True,
        COPIES_HELP,
        unset="where they fit into memory",
        source=ENGINE,
        group="memory",
    )
    sampling_product: SamplingProduct = setting(
        "auto",
        PRODUCT_HELP,
        unset="the resumed run's, else the faster one",
        source=ENGINE,
        group="memory",
    )
    memory_check: bool = setting(True, CHECK_HELP, source=ENGINE, group="memory")
    bf16: bool = setting(
        True,
        "base model in bfloat16; adapters, their gradients and AdamW's state stay fp32",
        source=PAPER_SFT,
        group="memory",
    )
    tf32: bool = setting(False, TF32_HELP, source=ENGINE, group="memory")
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

    shard_base: bool = setting(
        False,
        "shard the base's decoder layers among the ranks of a node (FSDP2), for a base that does"
        " not fit on each GPU while it trains; same numbers; rollouts and evaluations gather all of"
        " it on every GPU",
        source=ENGINE,
        group="memory",
    )

    max_completion_length: int = setting(
        MAX_COMPLETION_LENGTH,
        "longest completion that is sampled or decoded",
        unit="tokens",
        source=OURS,
        group="decoding",
        within=SIZE,
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
        within=THREADS,
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
        within=COUNT,
    )
    save_steps: int | None = setting(
        None,
        "a checkpoint every so many steps, beside those at every evaluation",
        unset="only those",
        unit="optimizer steps",
        group="run",
        within=COUNT,
    )
    save_minutes: float | None = setting(
        20.0,
        "a checkpoint after the first step that ends so long after the last one; the next one takes"
        " its place. none or 0: only the others",
        unit="minutes",
        source=ENGINE,
        group="run",
        within="[0, 525600]",
    )
    save_total_limit: int | None = setting(
        3,
        "checkpoints to keep, or none for all; the best and the last are never deleted",
        unit="checkpoints",
        source=ENGINE,
        group="run",
        within=COUNT,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "a checkpoint-<step> folder, or a run folder for its newest sound checkpoint; settings that"
        " are not given as flags are those of that run, and a larger --max_steps or"
        " --num_train_epochs makes it longer; auto: go on with the unfinished run of this very"
        " command, in --output_dir or the newest under runs/, else begin one",
        unset="a new run, or the unfinished one of this very command in --output_dir",
        group="run",
    )

    @property
    def hospital_weights(self) -> dict[str, float]:
        """Return the weights of --train_file by hospital, {} where none is given."""
        return hospital_weights(self.train_file)

    @property
    def label_set(self) -> LabelSet:
        """Return the labels that there are: those of --label_file, or the 14."""
        return labels_of(self.label_file)

    @property
    def instruction(self) -> Prompt:
        """Return what the model is told beside an image, with the labels in it."""
        return prompt_of(self.prompt, self.label_set)


def asking_problems(label_file: KeptFile | None, prompts: Iterable[NameOrFile]) -> list[str]:
    """Name what is wrong with the labels and with the instructions in them, one line each."""
    if problems := label_problems(label_file):
        return problems
    label_set = labels_of(label_file)
    return [
        f"--prompt {problem}"
        for prompt in prompts
        for problem in prompt_problems(prompt, label_set)
    ]


def label_problems(label_file: KeptFile | None) -> list[str]:
    """Name what is wrong with a label file, one line each."""
    try:
        labels_of(label_file)
    except DataError as error:
        return [f"--label_file {problem}" for problem in error.problems]
    return []


def rounded_up(number: float) -> int:
    """Round up to a whole number, but not for the noise of floats: 1.1 * 10 is 11, not 12."""
    return math.ceil(round(number, 6))


def by_ranks(ranks: int) -> str:
    """Say in a product of counts that it is taken once for each rank, "" for a single one."""
    return f" x {ranks} ranks" if ranks > 1 else ""


def training_problems(config: TrainingConfig) -> list[str]:
    """Name what is wrong with the shared settings, one line each: ranges, unknown names."""
    problems = range_problems(config)
    if config.show_batch and config.dry_run:
        problems.append("--show_batch and --dry_run each stop the run; give one of them")
    if config.shard_base and Launch.of().local_size == 1:
        problems.append(
            "--shard_base shards the base among the ranks of a node, and there is one: start with"
            " torchrun and --nproc_per_node, or leave it out"
        )
    if config.shard_base and config.compile:
        problems.append("--shard_base and --compile do not go together; leave out one of them")
    problems += asking_problems(config.label_file, [config.prompt])
    if config.answer_format not in ANSWER_FORMATS:
        problems.append(
            f"--answer_format {config.answer_format}: no such form; there are"
            f" {', '.join(ANSWER_FORMATS)}"
        )
    problems += train_files(config.train_file)[1]
    return problems + named_files(config.validation_file, "validation_file", taken=(TRAIN,))[1]


def validation_files(config: TrainingConfig) -> dict[str, str]:
    """Read --validation_file -> {name: file, or demo:SPLIT}."""
    return named_files(config.validation_file, "validation_file")[0]


def data_specs(config: TrainingConfig) -> dict[str, str]:
    """Gather the data files, "train" or each hospital's train.NAME first.

    Returns {name: file, or demo:SPLIT}.
    """
    return train_specs(config.train_file) | validation_files(config)


# ---- command line --------------------------------------------------------------------------------
def parse_training(
    config_classes: Sequence[type],
    argv: Sequence[str],
    *,
    script: Literal["sft", "grpo"],
    description: str,
    validate: Callable[..., list[str]],
) -> Resolved:
    """Read flags, recipe and a resumed run's settings of either script, by `parse_config`.

    Without a model, an adapter or data on the command line, the recipe of the demo applies. The
    command of an unfinished run goes on with it (engine/unfinished.py).
    """
    read = partial(
        parse_config,
        config_classes,
        argv,
        script=script,
        prog=f"run_{script}.py",
        description=description,
        validate=validate,
        default_recipe="demo",
        default_recipe_unless=("model_name_or_path", "adapter_name_or_path", "train_file"),
    )
    resuming = Resuming(
        "resume_from_checkpoint",
        partial(inherited_settings, script=script),
        free_to_change=(*FREE_TO_CHANGE, *LENGTHS, *BATCH_SETTINGS),
        settle=_kept_of_run,
    )
    resolved = read(resuming=resuming)
    unfinished = unfinished_run(resolved, data_specs(resolved.configs[0]), script)
    if unfinished is not None:
        resolved = read(resuming=replace(resuming, named=str(unfinished)))
        print(f"{unfinished}: goes on with the run that is there", file=sys.stderr)
    if line := recomputed_line(resolved, Launch.of().size):
        print(line, file=sys.stderr)
    return with_memory_cuts(placed(resolved))


def _kept_of_run(named: str, values: dict[str, Any], origins: dict[str, str]) -> Changes:
    """Let the batch of a resumed run stay what it is, and the product of its sampler.

    The batch by `settled_batch`, on the ranks of today. The product where the command leaves it
    open: another one rounds in another way.
    """
    record = record_of(named)
    changes: Changes = {**settled_batch(record, values, origins, Launch.of().size)}
    product = record["settings"].get("sampling_product", {}).get("value", "auto")
    if values["sampling_product"] == "auto" != product:
        changes["sampling_product"] = product, "resumed run"
    return changes


def finished(resolved: Resolved, found: Sequence[str], kind: Literal["sft", "grpo"]) -> Resolved:
    """Check what can only be told of finished settings, and return them.

    found: the problems of their values, one line each.

    Raises ConfigError for those, and UsageError or DataError where a data file, the model's folder
    or output_dir cannot be used.
    """
    config: TrainingConfig = resolved.configs[0]
    problems = list(found)
    if config.min_visual_tokens > config.max_visual_tokens:
        problems.append(
            f"--min_visual_tokens {config.min_visual_tokens} is above --max_visual_tokens"
            f" {config.max_visual_tokens}"
        )
    if problems:
        raise ConfigError(problems)
    check_data_files(data_specs(config).values(), config.label_set)
    check_model_folder(config.model_name_or_path)
    writes = not (config.dry_run or config.show_batch)
    if writes:
        resumed = resumed_folder(config.resume_from_checkpoint, config.output_dir)
        if resumed is None:
            check_output_dir(config.output_dir, kind)
        else:
            check_writable(resumed)
            check_lock(resumed)
    return resolved


# ---- run_sft.py ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Hold the settings of supervised fine-tuning."""

    adapter_name_or_path: str | None = setting(
        None,
        "adapter to go on training, with its own rank and alpha",
        unset="a fresh one",
        group="model and data",
    )
    lora_dropout: float = setting(
        0.1,
        "dropout on the adapter's input",
        source=PAPER_SFT,
        group="adapter",
        within="[0, 1)",
    )
    validation_split: float = setting(
        0.1,
        "share of the training data held out for the validation loss, by patient, where no"
        " --validation_file has answers",
        source=PAPER_SFT,
        group="model and data",
        within="(0, 1)",
    )
    early_stopping_patience: int = setting(
        2,
        "stop after this many epochs in a row without a better validation loss",
        unit="epochs",
        source=PAPER_SFT,
        group="optimization",
        within=COUNT,
    )

    def step_size(self, ranks: int = 1) -> int:
        """Count the examples of an optimizer step, of all ranks. ranks: how many there are."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks

    def steps_per_epoch(self, num_examples: int, ranks: int = 1) -> int:
        """Count the optimizer steps of an epoch. The last step may have fewer examples."""
        return math.ceil(num_examples / self.step_size(ranks))

    def total_steps(self, num_examples: int, ranks: int = 1) -> int:
        """Count the optimizer steps of the whole run, unless it stops early."""
        by_epochs = rounded_up(self.num_train_epochs * self.steps_per_epoch(num_examples, ranks))
        return self.max_steps or by_epochs

    def batch_line(self, num_examples: int, ranks: int = 1) -> str:
        """Say in a banner's line how sequences, steps and epochs relate."""
        micro, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        return (
            f"batch       {micro} sequences x {accumulation} accumulated{by_ranks(ranks)} ="
            f" {self.step_size(ranks)} an optimizer step;"
            f" {self.steps_per_epoch(num_examples, ranks)} steps an epoch,"
            f" {self.total_steps(num_examples, ranks)} steps in all, early stop after"
            f" {self.early_stopping_patience} epochs without a better loss"
        )


def sft_problems(config: SFTConfig) -> list[str]:
    """Name what is wrong with the values of one command line of run_sft.py, one line each."""
    found = training_problems(config)
    if not config.train_file:
        found.append("--train_file is missing: give the JSONL file with the teacher's answers")
    if not config.model_name_or_path and not config.adapter_name_or_path:
        found.append(
            "--model_name_or_path is missing: give a checkpoint's folder, a hub name or 'demo'"
        )
    return found


def resolve_sft(argv: Sequence[str]) -> Resolved:
    """Read a command line of run_sft.py into finished settings (an SFTConfig) with their origins.

    Raises ConfigError, UsageError or DataError for everything that the user can correct now.
    """
    resolved = parse_training(
        [SFTConfig],
        argv,
        script="sft",
        description=(
            "Supervised fine-tuning on teacher reasoning traces: Eq. 1 of ChexReason (arXiv"
            " 2512.23090), with LoRA."
        ),
        validate=sft_problems,
    )
    if resolved.configs[0].resume_from_checkpoint is None:
        resolved = inherit(
            resolved, (*INHERITED, "lora_r", "lora_alpha"), binding=("lora_r", "lora_alpha")
        )
    return finished(resolved, sft_problems(*resolved.configs), "sft")
