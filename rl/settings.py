"""The settings of run_grpo.py beside those of the objective: their checks, what follows from them,
what the SFT run fills in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data.examples import Example
from engine.config import Resolved, UsageError, setting
from engine.run import saved_settings
from engine.runtime import newest_finished_run
from engine.settings import OURS, PAPER_GRPO, TrainingConfig, from_adapter, training_problems
from rl.conditions import parse_combination, parse_condition
from rl.monitors import NAMES, WARN_WHEN
from rl.objective import ObjectiveConfig
from rl.rewards import HardReward, NuancedReward, RewardFunction
from rl.rollout import Sample

RewardName = Literal["hard", "nuanced"]  # the keys of `build_rewards`
# What an evaluation measures on each validation set; two sets or more also have a gap
# (rl/logs.py).
SET_METRICS = (
    "macro_f1",
    "micro_f1",
    "jaccard",
    "fail_rate",
    "invalid_rate",
    "completion_length",
    "reward",
    *(f"rewards/{name}/mean" for name in get_args(RewardName)),
)


@dataclass(frozen=True)
class GRPOConfig(TrainingConfig):
    """Settings of GRPO beside those of the objective (rl.objective.ObjectiveConfig), which are
    flags as well.
    """

    adapter_name_or_path: str | None = setting(
        None,
        "the SFT adapter to start from, which also is the frozen reference",
        unset=(
            "the newest finished SFT run under runs/, of the recipe's base model where there is a"
            " recipe"
        ),
        group="model and data",
    )
    learning_rate: float = setting(
        1e-5, "peak learning rate of AdamW", source=OURS, group="optimization"
    )
    num_train_epochs: float = setting(
        1.0, "passes over the prompts", unit="epochs", source=OURS, group="optimization"
    )
    warmup_ratio: float = setting(
        0.0,
        "share of all steps with rising learning rate, before the cosine",
        source=OURS,
        group="optimization",
    )
    max_grad_norm: float = setting(
        1.0, "global L2 norm at which gradients are clipped", source=OURS, group="optimization"
    )

    per_device_train_batch_size: int = setting(
        8,
        "completions in a micro-batch; those of one prompt share its forward",
        unit="completions",
        source=OURS,
        group="optimization",
    )
    gradient_accumulation_steps: int = setting(
        1,
        "micro-batches in an optimizer step",
        unit="micro-batches",
        source=OURS,
        group="optimization",
    )

    num_generations: int = setting(
        4, "G, the size of a prompt's group", unit="completions", source=PAPER_GRPO, group="rollout"
    )
    temperature: float = setting(
        0.8,
        "sampling temperature, also of every log-probability",
        source=PAPER_GRPO,
        group="rollout",
    )
    top_p: float = setting(
        0.95, "mass of the nucleus that is sampled from", source=PAPER_GRPO, group="rollout"
    )
    steps_per_generation: int | None = setting(
        None,
        "micro-batches in a rollout",
        unset="2 x gradient_accumulation_steps, so two optimizer steps use one rollout",
        unit="micro-batches",
        source=OURS,
        group="rollout",
    )
    num_iterations: int = setting(
        1, "how often each rollout is gone through", unit="passes", source=OURS, group="rollout"
    )
    mask_truncated_completions: bool = setting(
        False,
        "leave completions without a stop token out of the loss",
        source=OURS,
        group="rollout",
    )

    reward: RewardName = setting(
        "hard",
        "the reward that is trained on, Eq. 3 or Eq. 4; both are always logged",
        source=PAPER_GRPO,
        group="reward",
    )
    reward_scale: float | None = setting(
        None,
        "multiplies the reward before advantages",
        unset="1 for hard, 0.01 for nuanced",
        source=OURS,
        group="reward",
    )
    length_penalty: float = setting(0.1, "lambda_len of Eq. 3", source=OURS, group="reward")
    min_length: int = setting(
        250,
        "shorter valid answers get the length penalty of Eq. 3",
        unit="tokens (the paper names no unit)",
        source=PAPER_GRPO,
        group="reward",
    )

    eval_steps: int | None = setting(
        100,
        "evaluate every so many steps, beside the start and the end",
        unit="optimizer steps",
        source=OURS,
        group="evaluation",
    )
    metric_for_best_model: str | None = setting(
        None,
        "what chooses the best checkpoint: NAME/METRIC, with METRIC one of"
        f" {', '.join(SET_METRICS)}; gap; or a trade-off to be made large, such as 'a/macro_f1 -"
        " 0.5*gap'",
        unset="the first set's macro_f1",
        group="evaluation",
    )
    load_best_model_at_end: bool = setting(
        False,
        "make the best checkpoint the final adapter, not the last one",
        source=OURS,
        group="evaluation",
    )
    stop_when: tuple[str, ...] = setting(
        (),
        "end the run when this becomes true of what is logged: 'gap>0.05',"
        " 'monitors/entropy_drop>0.8 for 3' (3 times in a row), or of a trade-off; names that"
        " training does not log are refused after the first step",
        group="evaluation",
    )
    warn_when: tuple[str, ...] = setting(
        WARN_WHEN,
        "say when this becomes true; written like --stop_when",
        source=OURS,
        group="evaluation",
    )
    dump_step: int | None = setting(
        None,
        "write every tensor of this step's loss to step-<N>.safetensors in the run's folder",
        unset="none is written",
        unit="optimizer step",
        group="run",
    )


def problems(config: GRPOConfig, objective: ObjectiveConfig) -> list[str]:
    found = training_problems(config)
    if config.train_file is None:
        found.append(
            "--train_file is missing: give the JSONL file with the prompts' images and labels"
        )
    if config.num_generations < 2:
        found.append(
            f"--num_generations is {config.num_generations}; a group needs at least 2 completions,"
            " or every advantage is 0"
        )
    if not config.temperature > 0 or not 0 < config.top_p <= 1:
        found.append(
            f"--temperature {config.temperature} must be positive and --top_p {config.top_p} in"
            " (0, 1]"
        )
    for name in (
        "num_iterations",
        "steps_per_generation",
        "eval_steps",
        "reward_scale",
        "dump_step",
    ):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            found.append(f"--{name} is {getattr(config, name)}; it must be positive")
    return found + judging_problems(config) or batch_problems(config)


def judging_problems(config: GRPOConfig) -> list[str]:
    """What is wrong with the metrics and conditions that the run is judged by. Names of training
    metrics can only be checked once they are logged (`check_watched`).
    """
    sets = [entry.partition("=")[0] for entry in config.validation_file]
    combinations = (
        [("metric_for_best_model", config.metric_for_best_model)]
        if config.metric_for_best_model
        else []
    )
    found = []
    for flag in ("stop_when", "warn_when"):
        combinations += [(flag, text) for text in getattr(config, flag)]
    for flag, text in combinations:
        try:
            names = (
                parse_combination(text)
                if flag == "metric_for_best_model"
                else parse_condition(text).combination
            ).names
        except ValueError as error:
            found.append(f"--{flag} {text}: {error}")
            continue
        for name in names:
            prefix, _, metric = name.partition("/")
            if name == "gap" and len(sets) < 2:
                found.append(
                    f"--{flag} {text}: gap needs two sets of --validation_file or more, there are"
                    f" {len(sets)}"
                )
            elif prefix == "monitors" and flag != "metric_for_best_model" and name not in NAMES:
                found.append(f"--{flag} {text}: there is no {name}; there are {', '.join(NAMES)}")
            elif name != "gap" and (
                prefix in sets
                and metric not in SET_METRICS
                or prefix not in sets
                and flag == "metric_for_best_model"
            ):
                found.append(
                    f"--{flag} {text}: write NAME/METRIC with a NAME of --validation_file"
                    f" ({', '.join(sets) or 'none given'}) and a METRIC of"
                    f" {', '.join(SET_METRICS)}; or gap"
                )
    return found


def check_watched(config: GRPOConfig, logged: Collection[str]) -> None:
    """Raises UsageError for a condition on a metric that a first step has not logged."""
    sets = [entry.partition("=")[0] for entry in config.validation_file]
    known = {
        *logged,
        *NAMES,
        "gap",
        *(f"{name}/{metric}" for name in sets for metric in SET_METRICS),
    }
    missing = [
        f"--{flag} {text}: nothing of the name {name} is logged; there are gap, NAME/METRIC of"
        f" --validation_file, monitors/... and {', '.join(sorted(set(logged) - set(NAMES)))}"
        for flag in ("stop_when", "warn_when")
        for text in getattr(config, flag)
        for name in parse_condition(text).combination.names
        if name not in known
    ]
    if missing:
        raise UsageError(missing)


def batch_problems(config: GRPOConfig) -> list[str]:
    """Batches that do not divide, with the nearest that do."""
    micro, accumulation, group = (
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.num_generations,
    )
    per_rollout = micro_batches_per_rollout(config)
    found = []
    if per_rollout % accumulation:
        lower = per_rollout // accumulation * accumulation
        found.append(
            f"--steps_per_generation {per_rollout} does not divide into optimizer steps of"
            f" --gradient_accumulation_steps {accumulation}; the nearest that do:"
            f" {', '.join(str(n) for n in (lower, lower + accumulation) if n > 0)}"
        )
    if micro * per_rollout % group:
        fitting = [n for n in range(1, micro + group + 1) if n * per_rollout % group == 0]
        nearest = sorted(
            {
                max((n for n in fitting if n < micro), default=fitting[0]),
                min(n for n in fitting if n > micro),
            }
        )
        found.append(
            f"a rollout of --per_device_train_batch_size {micro} x {per_rollout} micro-batches ="
            f" {micro * per_rollout} completions does not divide into groups of --num_generations"
            f" {group}; the nearest --per_device_train_batch_size that do:"
            f" {', '.join(map(str, nearest))}"
        )
    return found


def micro_batches_per_rollout(config: GRPOConfig) -> int:
    return config.steps_per_generation or 2 * config.gradient_accumulation_steps


def updates_per_rollout(config: GRPOConfig) -> int:
    return (
        micro_batches_per_rollout(config)
        // config.gradient_accumulation_steps
        * config.num_iterations
    )


def prompts_per_rollout(config: GRPOConfig) -> int:
    return (
        config.per_device_train_batch_size
        * micro_batches_per_rollout(config)
        // config.num_generations
    )


def total_steps(config: GRPOConfig, num_examples: int) -> int:
    rollouts = max(1, round(config.num_train_epochs * num_examples / prompts_per_rollout(config)))
    return config.max_steps or rollouts * updates_per_rollout(config)


def batch_arithmetic(config: GRPOConfig, num_examples: int) -> list[str]:
    """Lines of the start banner: how prompts, completions and optimizer steps relate."""
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    prompts, updates = prompts_per_rollout(config), updates_per_rollout(config)
    completions = prompts * config.num_generations
    steps = total_steps(config, num_examples)
    rollouts = -(-steps // updates)
    return [
        (
            f"rollout     {prompts} prompts x {config.num_generations} completions = {completions}"
            f" completions, {updates} optimizer steps each"
        ),
        (
            f"batch       {micro} completions x {accumulation} accumulated = {micro * accumulation}"
            " an optimizer step"
        ),
        (
            f"run         {steps} optimizer steps = {rollouts} rollouts = {rollouts * prompts}"
            f" prompts ({rollouts * prompts / num_examples:.2f} epochs) = {rollouts * completions}"
            f" completions; trained on the {config.reward} reward"
        ),
    ]


def warnings(config: GRPOConfig, objective: ObjectiveConfig) -> list[str]:
    """Settings that are allowed but cannot do what they promise."""
    found = objective.warnings()
    if updates_per_rollout(config) == 1:
        found.append(
            "one optimizer step a rollout: the ratio is always 1, so clipping cannot act; raise"
            " --steps_per_generation or --num_iterations"
        )
    return found


def check_dump_step(resolved: Resolved, num_examples: int, done: int) -> None:
    """Raises UsageError where the step to dump is not among those that this run will make, `done`
    being made already. What a resumed run inherits may be done.
    """
    config: GRPOConfig = resolved.configs[0]
    step, steps = config.dump_step, total_steps(config, num_examples)
    if step is not None and step > steps:
        raise UsageError(
            f"--dump_step {step}: the run ends with step {steps}; name one of its steps"
        )
    if step is not None and step <= done and resolved.origins["dump_step"] != "resumed run":
        raise UsageError(
            f"--dump_step {step}: the run goes on after step {done} and does not make it again;"
            " name a later step, or resume from an earlier checkpoint"
        )


def length_warning(config: GRPOConfig, samples: Sequence[Sample]) -> str | None:
    """Eq. 3 to the letter punishes short answers; where most are short, an invalid answer (0) is
    worth more than a wrong one.
    """
    short = sum(len(sample.ids) < config.min_length for sample in samples)
    if config.reward != "hard" or config.length_penalty == 0 or 2 * short <= len(samples):
        return None
    return (
        f"{short} of {len(samples)} completions of the first rollout are shorter than --min_length"
        f" {config.min_length}: a valid but wrong answer gets {-config.length_penalty}, an invalid"
        " one 0. Lower --min_length, or set --length_penalty 0"
    )


def from_sft_run(resolved: Resolved) -> Resolved:
    """Fill in what was not given: the newest finished SFT run, and what follows from it
    (`from_adapter`).
    """
    config: GRPOConfig = resolved.configs[0]
    if config.adapter_name_or_path is None:
        base = (
            config.model_name_or_path
            if resolved.origins["model_name_or_path"].startswith("recipe")
            else None
        )
        of_base, recipe = (f" of {base}", f" --recipe {resolved.recipe}") if base else ("", "")
        newest = newest_finished_run(Path("runs"), "sft", base)
        if newest is None:
            raise UsageError(
                f"no finished SFT run{of_base} named runs/<time>-sft; run `python"
                f" run_sft.py{recipe}` first, or give --adapter_name_or_path"
            )
        resolved = resolved.with_value(
            "adapter_name_or_path", str(newest), f"newest SFT run{of_base}"
        )
    return from_adapter(_with_its_prompt(resolved))


def _with_its_prompt(resolved: Resolved) -> Resolved:
    """Prompt and answer format of the SFT run, which a recipe does not change. Raises UsageError
    for a flag that would: the policy and its reference know only the one that they were trained on.
    """
    config: GRPOConfig = resolved.configs[0]
    saved = saved_settings(Path(config.adapter_name_or_path))
    for name in ("prompt", "answer_format"):
        learned, given = saved.get(name), getattr(config, name)
        if learned is None or given in (None, learned):
            continue
        if resolved.origins[name] == "flag":
            raise UsageError(
                f"--{name} {given}: the SFT run {config.adapter_name_or_path} was trained with"
                f" {learned}; leave the flag out, or give the adapter of another SFT run"
            )
        resolved = resolved.with_value(name, learned, "adapter's run")
    return resolved


def build_rewards(config: GRPOConfig, examples: list[Example]) -> dict[str, RewardFunction]:
    """Both rewards; the label frequencies of Eq. 4 are those of the training data."""
    evaluated = Counter(label for example in examples for label in example.evaluated_labels)
    positive = Counter(label for example in examples for label in example.target.labels)
    frequency = {label: positive[label] / evaluated[label] for label in evaluated}
    rewards: dict[str, RewardFunction] = {
        "hard": HardReward(length_penalty=config.length_penalty, min_length=config.min_length),
        "nuanced": NuancedReward(frequency),
    }
    if config.reward_scale is not None:
        rewards[config.reward].scale = config.reward_scale
    return rewards
