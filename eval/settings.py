"""Declare and check the flags of evaluation, before anything heavy is imported.

`EvalConfig` has the flags of eval.evaluate. `DecodingConfig` has those that eval.matrix shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.answers import ANSWER_FORMATS
from data.files import KeptFile, NameOrFile, named_files
from data.hospitals import train_files
from data.label_sets import labels_of
from data.labels import LabelSet
from data.prompt_files import prompt_of
from data.prompts import Prompt
from engine.config import ConfigError, Resolved, range_problems, setting
from engine.inherited import inherit
from engine.server_settings import REMOTE_HELP, TIMEOUT
from engine.settings import (
    CHECK_HELP,
    COPIES_HELP,
    COUNT,
    ENGINE,
    EVAL_BATCH_UNSET,
    LABEL_FILE_HELP,
    MAX_COMPLETION_LENGTH,
    OURS,
    PAPER_GRPO,
    PAPER_SFT,
    PRODUCT_HELP,
    PROMPT_HELP,
    ROWS,
    SEED,
    SIZE,
    TEMPERATURE,
    TF32_HELP,
    THREADS,
    TOP_P,
    BadImages,
    SamplingProduct,
    TrainingConfig,
    asking_problems,
)

if TYPE_CHECKING:  # at run time flags are checked without torch
    import torch

RefusedImages = Literal["fail", "empty"]
REQUESTS = 16  # to a server at a time
# Settings of a model that the engine loads. A server decides them for its own.
OF_ENGINE = (
    "min_visual_tokens",
    "max_visual_tokens",
    "vision_cache_dir",
    "num_threads",
    "bf16",
    "tf32",
    "sampling_copies",
    "sampling_product",
    "memory_check",
)
# Settings of a server, which say nothing of what its model answers.
OF_SERVER = (
    "vllm_server_base_url",
    "vllm_server_timeout",
    "allow_remote_server",
    "refused_images",
)
BESIDE_A_SERVER = "has no place beside --vllm_server_base_url"


@dataclass(frozen=True)
class DecodingConfig:
    """Say what is decoded and how. What is not given is as in the run that trained the adapter."""

    data_file: tuple[str, ...] = setting(
        (),
        "data sets to decode, each NAME=FILE (JSONL) or NAME=demo:SPLIT; with --predictions: what"
        " its answers are joined with by id",
        aliases=("validation_file",),
    )
    image_root: str | None = setting(
        None, "folder that image paths are relative to", unset="each data file's own folder"
    )
    bad_images: BadImages = setting(
        "fail",
        "an unreadable image stops the command; or skip: all images are read first, and the"
        " examples of bad ones are left out of the scores and listed in bad-images-<name>.jsonl",
        source=ENGINE,
    )
    label_file: KeptFile | None = setting(
        None,
        LABEL_FILE_HELP,
        unset="the adapter's run's, or that of the predictions, else CheXpert's 14 labels",
    )
    train_file: tuple[str, ...] = setting(
        (),
        "training data whose label frequencies the baselines imitate, as run_grpo.py takes them:"
        " FILE, or NAME=FILE of several hospitals, all images counted once",
        unset="each data set's own frequencies",
    )
    max_samples: int | None = setting(
        None,
        "use only the first so many rows of each data set",
        unset="all",
        unit="rows",
        within=COUNT,
    )
    num_generations: int = setting(
        1,
        "completions of each image; above 1 they vote: a label is said where at least half of them"
        " say it, and its share is its probability",
        unit="completions",
        source=OURS,
        within=ROWS,
    )
    temperature: float = setting(
        0.0,
        f"of the sampler; 0 is greedy decoding; with --num_generations above 1, {TEMPERATURE:g} as"
        " in rollouts where it is not given",
        source=OURS,
        within="[0, 100]",
    )
    top_p: float = setting(
        TOP_P,
        "nucleus of the sampler; no effect at temperature 0",
        source=PAPER_GRPO,
        within="(0, 1]",
    )
    max_completion_length: int = setting(
        MAX_COMPLETION_LENGTH,
        "where a completion is cut",
        unset="the adapter's run's, else 512",
        unit="tokens",
        source=OURS,
        within=SIZE,
    )
    per_device_eval_batch_size: int = setting(
        8,
        "completions decoded together, at least those of one image; changes answers by rounding at"
        " most; halved where memory runs out, down to one. Of a server: requests at a time",
        unset=f"{EVAL_BATCH_UNSET}; {REQUESTS} of a server",
        unit="completions",
        source=ENGINE,
        within=ROWS,
    )
    min_visual_tokens: int = setting(
        TrainingConfig.min_visual_tokens,
        "an image is enlarged to at least this many visual tokens; Gemma 3 has a fixed number",
        unset="the adapter's run's, else 256",
        unit="tokens",
        source=PAPER_SFT,
        within=SIZE,
    )
    max_visual_tokens: int = setting(
        TrainingConfig.max_visual_tokens,
        "an image is reduced to at most this many visual tokens",
        unset="the adapter's run's, else 512",
        unit="tokens",
        source=PAPER_SFT,
        within=SIZE,
    )
    vision_cache_dir: str | None = setting(
        None,
        "folder that keeps image features across runs, by tower, processor and image; only ever"
        " grows",
        unset="none",
        source=ENGINE,
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of torch",
        unset="the adapter's run's, else torch's own choice",
        unit="threads",
        within=THREADS,
    )
    bf16: bool = setting(
        True,
        "base model in bfloat16 rather than float32",
        unset="the adapter's run's, else true on a GPU and false on a CPU",
        source=ENGINE,
    )
    tf32: bool = setting(False, TF32_HELP, source=ENGINE)
    sampling_copies: bool = setting(
        True, COPIES_HELP, unset="where they fit into memory", source=ENGINE
    )
    sampling_product: SamplingProduct = setting(
        "auto", PRODUCT_HELP, unset="the adapter's run's, else the faster one", source=ENGINE
    )
    memory_check: bool = setting(True, CHECK_HELP, source=ENGINE)
    seed: int = setting(
        0,
        "of the sampler, the intervals and the random baseline",
        source=ENGINE,
        within=SEED,
    )
    vllm_server_base_url: str | None = setting(
        None,
        "ask a server that speaks OpenAI's protocol (vLLM, an API) in place of a model of the"
        " engine's own: no weights are read; such as http://127.0.0.1:8000; its key is the"
        " environment variable VLLM_API_KEY",
        unset="none",
        source=ENGINE,
        group="server",
    )
    vllm_server_timeout: float = setting(
        TIMEOUT,
        "longest time that one request may take, which is one answer; one that takes longer ends"
        " the command, which goes on from there",
        unit="seconds",
        source=ENGINE,
        group="server",
        within="(0, 86400]",
    )
    allow_remote_server: bool = setting(False, REMOTE_HELP, source=ENGINE, group="server")
    refused_images: RefusedImages = setting(
        "fail",
        "an image that the server refuses (status 400, 413, 415 or 422: a filter, a limit) stops"
        " the command, which goes on from there; or empty: it counts as an answer that cannot be"
        " read, and its row says why",
        source=ENGINE,
        group="server",
    )

    @property
    def label_set(self) -> LabelSet:
        """Return the labels that there are: those of --label_file, or the 14."""
        return labels_of(self.label_file)


@dataclass(frozen=True)
class EvalConfig(DecodingConfig):
    """Hold the flags of `python -m eval.evaluate`."""

    model_name_or_path: str = setting(
        "",
        "base model: a folder, a hub name, 'demo' or 'demo-gemma'; with --vllm_server_base_url the"
        " name that the server has for it, or for an adapter",
        unset="the adapter's base",
    )
    adapter_name_or_path: str | None = setting(
        None, "folder of a LoRA adapter", unset="none: the base model itself is evaluated"
    )
    predictions: tuple[str, ...] = setting(
        (),
        "files to score again without a model, each NAME=FILE: predictions-<name>.jsonl,"
        " samples-<name>.jsonl, which vote again, or completions.jsonl of a GRPO run, whose groups"
        " vote where --num_generations is given; with --data_file, answers of any model: rows"
        ' {"id", "completion"}, whose truth is the data file\'s',
    )
    label_map: Literal["nih_nine", "nih_ten"] | None = setting(
        None,
        "with --predictions: labels anew from NIH's own strings, the paper's nine categories or ten"
        " with Pleural Effusion",
        unset="the labels in the file",
    )
    no_label: Literal["empty", "no_finding", "drop"] = setting(
        "empty",
        "with --label_map: an image without any of its labels keeps its empty set, is called No"
        " Finding, or is left out",
        source="as in data.select for NIH",
    )
    swap_images: bool = setting(
        False,
        "answer every image a second time from another patient's X-ray: what stays the same did not"
        " come from the image; twice the time",
        source=OURS,
    )
    thresholds_from: str | None = setting(
        None,
        "votes only: NAME of a data set of this command, or predictions-<name>.jsonl of an earlier"
        " one, whose truth chooses each label's threshold; F1 with it is told for every data set",
        unset="no other threshold than half of the samples",
    )
    output_dir: str | None = setting(
        None, "where predictions and scores go", unset="a new folder runs/<time>-eval"
    )
    prompt: NameOrFile = setting(
        TrainingConfig.prompt,
        PROMPT_HELP,
        unset="the adapter's run's, else free_reasoning",
        source=OURS,
    )
    answer_format: str = setting(
        TrainingConfig.answer_format,
        f"form of a valid answer: {', '.join(ANSWER_FORMATS)}",
        unset="the adapter's run's where the prompt is, else the prompt's own; with --predictions:"
        " that of each row",
        source=OURS,
    )

    @property
    def instruction(self) -> Prompt:
        """Return what the model is told beside an image, with the labels in it."""
        return prompt_of(self.prompt, self.label_set)


# ---- checks --------------------------------------------------------------------------------------
def config_problems(config: EvalConfig) -> list[str]:
    """Check the values of one command line, beyond their types -> problems, one line each."""
    problems = (
        decoding_problems(config, [config.prompt])
        + named_files(config.predictions, "predictions")[1]
    )
    if config.predictions:
        problems += [
            f"--{name}: has no place beside --predictions, which scores again without a model"
            for name in ("model_name_or_path", "adapter_name_or_path", "vllm_server_base_url")
            if getattr(config, name)
        ]
        problems += joined_files(config)[1]
    elif config.label_map:
        problems.append(
            "--label_map: goes with --predictions; a data file gets its labels from data.select"
            " --label_map"
        )
    elif not config.data_file:
        problems.append(
            "nothing to evaluate: give --data_file NAME=FILE, or --predictions NAME=FILE to score"
            " again"
        )
    elif config.vllm_server_base_url is not None:
        problems += _served_problems(config)
    elif not config.model_name_or_path and not config.adapter_name_or_path:
        problems.append("no model: give --model_name_or_path, --adapter_name_or_path, or both")
    problems += _threshold_problems(config) + _swap_problems(config)
    if config.answer_format not in ANSWER_FORMATS:
        problems.append(
            f"--answer_format {config.answer_format}: unknown; known: {', '.join(ANSWER_FORMATS)}"
        )
    return problems


def _served_problems(config: EvalConfig) -> list[str]:
    """Name what a model on a server lacks, or cannot have."""
    problems = []
    if not config.model_name_or_path:
        problems.append(
            "--model_name_or_path is missing: give the name that the server has for the model"
        )
    if config.adapter_name_or_path is not None:
        problems.append(
            f"--adapter_name_or_path: {BESIDE_A_SERVER}, which has adapters under names of their"
            " own: load it there, and give that name in --model_name_or_path"
        )
    return problems


def engine_problems(resolved: Resolved, names: Sequence[str] = ()) -> list[str]:
    """Name the flags of the engine's own model, where a server alone is asked.

    names: of further such flags.
    """
    return [
        f"--{name}: {BESIDE_A_SERVER}, "
        + (
            "which sizes images itself: say it there (vLLM: --mm-processor-kwargs)"
            if name.endswith("visual_tokens")
            else "since no model is loaded here"
        )
        for name in (*OF_ENGINE, *names)
        if resolved.origins[name] == "flag"
    ]


def joined_files(config: EvalConfig) -> tuple[dict[str, str], list[str]]:
    """Pair --predictions with --data_file -> ({name of the predictions: data file}, problems).

    One data file is joined with all predictions. Several go by name, each with the predictions of
    its own. Without a data file nothing is joined.
    """
    named, files = (
        named_files(values, flag)[0]
        for values, flag in ((config.predictions, "predictions"), (config.data_file, "data_file"))
    )
    if len(files) == 1:
        return dict.fromkeys(named, *files.values()), []
    problems = [
        f"--{flag} {name}: of several data files each is joined with the predictions of its name,"
        f" and there is no --{other} {name}=FILE"
        for flag, mine, other, theirs in (
            ("predictions", named, "data_file", files),
            ("data_file", files, "predictions", named),
        )
        for name in mine
        if files and name not in theirs
    ]
    return {name: files[name] for name in named if name in files}, problems


def _swap_problems(config: EvalConfig) -> list[str]:
    problems = []
    if config.swap_images and config.predictions:
        problems.append(
            "--swap_images: needs a model to answer again, so it has no place beside --predictions"
        )
    if config.swap_images and config.num_generations > 1:
        problems.append(
            "--swap_images: compares one answer an image with another; evaluate once with it and"
            " once with --num_generations"
        )
    return problems


def _threshold_problems(config: EvalConfig) -> list[str]:
    chosen_on = config.thresholds_from
    if chosen_on is None:
        return []
    problems = []
    flag = "predictions" if config.predictions else "data_file"
    names, _ = named_files(getattr(config, flag), flag)
    if chosen_on not in names and not Path(chosen_on).is_file():
        problems.append(
            f"--thresholds_from {chosen_on}: is neither a data set of this command"
            f" ({', '.join(names) or 'there is none'}) nor a file of predictions"
        )
    if not config.predictions and config.num_generations == 1:
        problems.append(
            "--thresholds_from: one answer an image has no shares to put a threshold on; give"
            " --num_generations above 1"
        )
    return problems


def decoding_problems(config: DecodingConfig, prompts: Sequence[NameOrFile]) -> list[str]:
    """Check the settings of decoding, labels and prompts included -> problems, one line each."""
    problems = range_problems(config) + named_files(config.data_file, "data_file")[1]
    problems += train_files(config.train_file)[1]
    problems += asking_problems(config.label_file, prompts)
    if config.vllm_server_base_url is None:
        return problems + [
            f"--{name}: goes with --vllm_server_base_url"
            for name in OF_SERVER
            if getattr(config, name) != getattr(DecodingConfig, name)
        ]
    from engine.server_address import url_problems  # here: others need nothing of a server

    found = url_problems(config.vllm_server_base_url, config.allow_remote_server)
    return problems + [f"--vllm_server_base_url {problem}" for problem in found]


# ---- what was not given --------------------------------------------------------------------------
# What an evaluation takes over from the adapter, and from the run that trained it.
INHERITED = (
    "model_name_or_path",
    "label_file",
    "prompt",
    "answer_format",
    "max_completion_length",
    "min_visual_tokens",
    "max_visual_tokens",
    "bf16",
    "num_threads",
    "sampling_product",
)


def complete(resolved: Resolved) -> Resolved:
    """Fill in what was not given, so that an adapter is evaluated as its run trained it.

    Raises UsageError for a folder without an adapter, for one that names no base model, and for a
    config.json that cannot be used.
    """
    folder = resolved.configs[0].adapter_name_or_path or ""
    from_run = str(Path(folder) / "config.json")
    resolved = inherit(resolved, INHERITED, from_run=from_run, from_prompt="prompt {}")
    config: EvalConfig = resolved.configs[0]
    smallest, largest = config.min_visual_tokens, config.max_visual_tokens
    problems = config_problems(config)
    if config.vllm_server_base_url is not None:
        problems += engine_problems(resolved)
        if not is_given(resolved, "per_device_eval_batch_size"):
            origin = "vllm_server_base_url"
            resolved = resolved.with_value("per_device_eval_batch_size", REQUESTS, origin)
    k = config.num_generations
    if k > 1 and not is_given(resolved, "temperature"):
        resolved = resolved.with_value("temperature", TEMPERATURE, f"num_generations {k}")
    elif k > 1 and config.temperature == 0:
        problems.append(
            f"--temperature 0: greedy decoding gives the same answer {k} times; leave the flag out"
            f" for {TEMPERATURE:g}, give one above 0, or --num_generations 1"
        )
    if smallest > largest:
        problems.append(f"--min_visual_tokens {smallest} is above --max_visual_tokens {largest}")
    if problems:
        raise ConfigError(problems)
    return resolved


def with_precision(resolved: Resolved, device: torch.device) -> Resolved:
    """Fill in --bf16 where neither a flag nor the adapter's run gave it: true on a GPU alone."""
    if is_given(resolved, "bf16"):
        return resolved
    return resolved.with_value("bf16", device.type == "cuda", "default")


def is_given(resolved: Resolved, name: str) -> bool:
    """Tell whether a setting has another value than its default: from a flag, a recipe or a run."""
    return resolved.origins[name] != "default"
