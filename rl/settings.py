"""Declare and check the settings of run_grpo.py, and make of them what needs no model.

The SFT run decides what is not given. Warnings about values that defeat their purpose are written
here. The objective's settings are declared in rl/objective.py, --reward is read in
rl/reward_choice.py. Nothing here loads torch before a command line is accepted.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.hospitals import train_files
from engine.config import ConfigError, Resolved, UsageError, setting
from engine.inherited import FRESH, INHERITED, inherit
from engine.launch import Launch
from engine.reward_name import reward_name
from engine.runtime import newest_finished_run
from engine.server_settings import ServerSettings, server_problems, server_warnings
from engine.settings import (
    COUNT,
    EVALUATED_METRICS,
    OURS,
    PAPER_GRPO,
    POSITIVE,
    ROWS,
    TEMPERATURE,
    TOP_P,
    TrainingConfig,
    finished,
    label_problems,
    parse_training,
    training_problems,
    validation_files,
)
from rl.conditions import parse_combination, parse_condition
from rl.flags import objective_config
from rl.monitors import WARN_WHEN, monitor_names
from rl.plan import BatchPlan
from rl.reward_choice import (
    REGISTERED,
    RewardChoice,
    imports_that_nobody_gave,
    reward_choice,
    reward_problems,
)

if TYPE_CHECKING:
    from rl.objective import ObjectiveConfig
    from rl.samples import Sample

# What the policy and its reference were taught: GRPO cannot change it.
BINDING = ("label_file", "prompt", "answer_format")
LengthOf = Literal["text", "completion"]  # the length that rewards are given
# What an evaluation measures on each validation set, beside rewards that --reward adds.
SET_METRICS = (*EVALUATED_METRICS, "reward", *(f"rewards/{name}/mean" for name in REGISTERED))

# What a rollout logs of each hospital where there are several, as NAME/HOSPITAL (rl/logs.py)
SHARE_OF_PROMPTS = "share_of_prompts"
BY_HOSPITAL = ("reward", "reward_group_std", "frac_reward_zero_std", SHARE_OF_PROMPTS)

# What an evaluation of two sets or more says of them together (rl/evaluation.py): the first set's
# gain less the others', on all labels and on those that both can express, and the mean of both
# sides' gain on the latter, with standard errors
GAPS = ("gap", "gap_se", "gap_shared", "gap_shared_se", "gain_shared", "gain_shared_se")


# NAME of the first validation set, that of the home hospital, in conditions and in what chooses the
# best: recipes do not know the names of the sets. A set of this very name is meant before it.
HOME = "home"


def set_names(config: TrainingConfig) -> list[str]:
    """List the names that a metric NAME/METRIC may have: those of the sets, and HOME."""
    sets = list(validation_files(config))
    return [*sets, HOME] if sets and HOME not in sets else sets


@dataclass(frozen=True)
class GRPOConfig(ServerSettings, TrainingConfig):
    """Hold the settings of GRPO beside those of the objective, which are flags as well."""

    adapter_name_or_path: str = setting(
        "",
        "the SFT adapter to start from, which also is the frozen reference; or none: a fresh one of"
        " --lora_r and --lora_alpha on --model_name_or_path, which itself is the reference",
        unset=(
            "the newest finished SFT run under runs/, of the base model that a flag or recipe names"
        ),
        group="model and data",
    )
    learning_rate: float = setting(
        1e-5,
        "peak learning rate of AdamW",
        source=OURS,
        group="optimization",
        within=POSITIVE,
    )
    num_train_epochs: float = setting(
        1.0,
        "passes over the prompts, rounded up to whole rollouts",
        unit="epochs",
        source=OURS,
        group="optimization",
        within="(0, 1000000]",
    )
    warmup_ratio: float = setting(
        0.0,
        "share of all steps with rising learning rate, before --lr_scheduler_type",
        source=OURS,
        group="optimization",
        within="[0, 1)",
    )
    weight_decay: float = setting(
        0.0,
        "AdamW's decoupled weight decay",
        source=OURS,
        group="optimization",
        within="[0, inf)",
    )
    max_grad_norm: float = setting(
        1.0,
        "global L2 norm at which gradients are clipped",
        source=OURS,
        group="optimization",
        within=POSITIVE,
    )

    per_device_train_batch_size: int = setting(
        8,
        "completions in a micro-batch; those of one prompt share its forward",
        unit="completions",
        source=OURS,
        group="optimization",
        within=ROWS,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "micro-batches in an optimizer step, of each rank where there are several",
        unit="micro-batches",
        source=OURS,
        group="optimization",
        within=ROWS,
    )

    num_generations: int = setting(
        4,
        "G, the size of a prompt's group; of one completion every advantage would be 0",
        unit="completions",
        source=PAPER_GRPO,
        group="rollout",
        within="[2, 65536]",
    )
    temperature: float = setting(
        TEMPERATURE,
        "sampling temperature, also of every log-probability",
        source=PAPER_GRPO,
        group="rollout",
        within="(0, 100]",
    )
    top_p: float = setting(
        TOP_P,
        "mass of the nucleus that is sampled from",
        source=PAPER_GRPO,
        group="rollout",
        within="(0, 1]",
    )
    steps_per_generation: int | None = setting(
        None,
        "micro-batches in a rollout, of each rank where there are several",
        unset="2 x gradient_accumulation_steps, so two optimizer steps use one rollout",
        unit="micro-batches",
        source=OURS,
        group="rollout",
        within=ROWS,
    )
    sampling_batch_size: int | None = setting(
        None,
        "completions of a rollout that are decoded together; changes no completion; halved where"
        " memory runs out. With --use_vllm: that are asked for at a time, unless given those of 32"
        " prompts",
        unset="all",
        unit="completions",
        source=OURS,
        group="memory",
        within=ROWS,
    )
    num_iterations: int = setting(
        1,
        "how often each rollout is gone through",
        unit="passes",
        source=OURS,
        group="rollout",
        within=ROWS,
    )
    mask_truncated_completions: bool = setting(
        False,
        "leave completions without a stop token out of the loss",
        source=OURS,
        group="rollout",
    )

    reward: str = setting(
        "hard",
        "the reward that is trained on: hard (Eq. 3), nuanced (Eq. 4), weighted (Eq. 3 by"
        " prevalence), fbeta (labels, not images); one of yours, MODULE:NAME; or a mixture,"
        " hard+0.5*weighted; all of these names are always logged",
        source=PAPER_GRPO,
        group="reward",
    )
    reward_scale: float | None = setting(
        None,
        "multiplies the reward, or the whole mixture, before advantages",
        unset="0.01 for nuanced, 1 for the others",
        source=OURS,
        group="reward",
        within=POSITIVE,
    )
    length_penalty: float = setting(
        0.1,
        "lambda_len of Eq. 3",
        source=OURS,
        group="reward",
        within="[0, inf)",
    )
    min_length: int = setting(
        250,
        "shorter valid answers get the length penalty of Eq. 3",
        unit="tokens (the paper names no unit)",
        source=PAPER_GRPO,
        group="reward",
        within="[0, 1000000]",
    )
    length_of: LengthOf = setting(
        "text",
        "what Eq. 3's length counts: text, the tokens that are neither blank nor repetition"
        " (nonsense that does not repeat counts); or completion, all tokens",
        source=OURS,
        group="reward",
    )

    reward_timeout: float = setting(
        60.0,
        "end the run, its state saved, where a reward takes longer for one completion; 0 for no"
        " limit",
        unit="seconds",
        source=OURS,
        group="reward",
        within="[0, 86400]",
    )

    eval_steps: int | None = setting(
        100,
        "evaluate every so many steps, beside the start and the end",
        unit="optimizer steps",
        source=OURS,
        group="evaluation",
        within=COUNT,
    )
    vote_baseline: bool = setting(
        True,
        "before the first step, let the start model answer by a vote of num_generations samples, as"
        " a baseline that costs no training; takes about as long as num_generations evaluations,"
        " less what they save by reading each prompt once",
        source=OURS,
        group="evaluation",
    )
    metric_for_best_model: str | None = setting(
        None,
        "what chooses the best checkpoint: NAME/METRIC, with METRIC one of"
        f" {', '.join(SET_METRICS)}; {', '.join(GAPS)}; or a trade-off to be made large, such as"
        f" 'gain_shared - gain_shared_se'. NAME {HOME} is the first set",
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
        "end the run when this becomes true of what is logged: 'gap_shared - 2*gap_shared_se > 0'"
        " (a loss of transfer beyond its noise), 'monitors/entropy_drop>0.8 for 3' (3 times in a"
        " row); names that training does not log are refused after the first step",
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
        within=COUNT,
    )

    @property
    def reward_choice(self) -> RewardChoice:
        """Return what --reward names. Raises ValueError for a text that names nothing."""
        return reward_choice(self.reward)

    @property
    def trained_reward(self) -> str:
        """Return the name under which the reward that is trained on is logged."""
        return reward_name(self.reward)


def grpo_problems(config: GRPOConfig, objective: ObjectiveConfig) -> list[str]:
    """Name what is wrong with the values of one command line of run_grpo.py, one line each."""
    found = training_problems(config)
    if not config.train_file:
        found.append(
            "--train_file is missing: give the JSONL file with the prompts' images and labels"
        )
    if config.adapter_name_or_path == FRESH and not config.model_name_or_path:
        found.append(
            "--model_name_or_path is missing: --adapter_name_or_path none starts from a base or"
            " merged model; give its folder, a hub name or 'demo'"
        )
    found += reward_problems(config.reward) + judging_problems(config) + server_problems(config)
    return found or BatchPlan.of(config, Launch.of().size).problems()


def judging_problems(config: GRPOConfig) -> list[str]:
    """Name what is wrong with the metrics and conditions that the run is judged by, one line each.

    Names of training metrics can only be checked once they are logged (`check_watched`).
    """
    files, sets = validation_files(config), set_names(config)
    measured = set_metrics(config)
    combinations = (
        [("metric_for_best_model", config.metric_for_best_model)]
        if config.metric_for_best_model
        else []
    )
    found = []
    readable = not label_problems(config.label_file)
    monitors = monitor_names(config.label_set) if readable else ()
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
            if name in GAPS and len(files) < 2:
                found.append(
                    f"--{flag} {text}: {name} needs two sets of --validation_file or more, there"
                    f" are {len(files)}"
                )
            elif (
                prefix == "monitors"
                and flag != "metric_for_best_model"
                and monitors
                and name not in monitors
            ):
                known = ", ".join(monitors)
                found.append(f"--{flag} {text}: there is no {name}; there are {known}")
            elif name not in GAPS and (
                prefix in sets
                and metric not in measured
                or prefix not in sets
                and flag == "metric_for_best_model"
            ):
                found.append(
                    f"--{flag} {text}: write NAME/METRIC with a NAME of --validation_file"
                    f" ({', '.join(files) or 'none given'}), or {HOME} for the first of them, and"
                    " a METRIC of"
                    f" {', '.join(measured)}; or {', '.join(GAPS)}"
                )
    return found


def set_metrics(config: GRPOConfig) -> tuple[str, ...]:
    """List what an evaluation of this run measures on each validation set."""
    if reward_problems(config.reward):
        return SET_METRICS
    added = [name for name in config.reward_choice.logged if name not in REGISTERED]
    return (*SET_METRICS, *(f"rewards/{name}/mean" for name in added))


def check_watched(config: GRPOConfig, logged: Collection[str]) -> None:
    """Raise UsageError for a condition on a metric that a first step has not logged.

    logged: the names of what it has logged.
    """
    sets = set_names(config)
    monitors = monitor_names(config.label_set)
    hospitals = [one.hospital for one in train_files(config.train_file)[0]]
    known = {
        *logged,
        # of which the first rollout may have had no prompt
        *(f"{name}/{one}" for name in BY_HOSPITAL for one in hospitals if len(hospitals) > 1),
        *monitors,
        *GAPS,
        *(f"{name}/{metric}" for name in sets for metric in set_metrics(config)),
    }
    missing = [
        f"--{flag} {text}: nothing of the name {name} is logged; there are"
        f" {', '.join(GAPS)}, NAME/METRIC of --validation_file, monitors/... and"
        f" {', '.join(sorted(set(logged) - set(monitors)))}"
        for flag in ("stop_when", "warn_when")
        for text in getattr(config, flag)
        for name in parse_condition(text).combination.names
        if name not in known
    ]
    if missing:
        raise UsageError(missing)


def warnings(config: GRPOConfig, objective: ObjectiveConfig) -> list[str]:
    """Name settings that are allowed but cannot do what they promise, one line each."""
    found = objective.warnings() + server_warnings(config)
    if BatchPlan.of(config).updates == 1:
        found.append(
            "one optimizer step a rollout: the ratio is always 1, so clipping cannot act; raise"
            " --steps_per_generation or --num_iterations"
        )
    return found


def check_dump_step(resolved: Resolved, steps: int, done: int) -> None:
    """Raise UsageError where the step to dump is not among those that this run will make.

    steps: optimizer steps of the whole run.
    done: optimizer steps that are made already. A step that a resumed run inherits may be done.
    """
    config: GRPOConfig = resolved.configs[0]
    step = config.dump_step
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
    """Warn where most answers are so short that Eq. 3 rates an invalid one above a wrong one.

    samples: the first rollout.
    """
    lengths = [
        sample.text_length if config.length_of == "text" else len(sample.ids) for sample in samples
    ]
    short = sum(length < config.min_length for length in lengths)
    is_eq_3 = "hard" in config.reward_choice.weights
    if not is_eq_3 or config.length_penalty == 0 or 2 * short <= len(samples):
        return None
    return (
        f"{short} of {len(samples)} completions of the first rollout are shorter than --min_length"
        f" {config.min_length}: a valid but wrong answer gets {-config.length_penalty}, an invalid"
        " one 0. Lower --min_length, or set --length_penalty 0"
    )


# ---- command line --------------------------------------------------------------------------------
def resolve_grpo(argv: Sequence[str]) -> Resolved:
    """Read a command line of run_grpo.py into finished settings with their origins.

    Its configs are a GRPOConfig and an ObjectiveConfig. Prompt and answer format are those of the
    SFT run: the policy and its reference know only what they were trained on. Raises ConfigError,
    UsageError or DataError for everything that the user can correct now.
    """
    resolved = parse_training(
        [GRPOConfig, objective_config()],
        argv,
        script="grpo",
        description=(
            "GRPO against a verifiable reward: Eq. 2 of ChexReason (arXiv 2512.23090), from an SFT"
            " adapter."
        ),
        validate=grpo_problems,
    )
    if resolved.configs[0].resume_from_checkpoint is None:
        of_adapter = ("lora_r", "lora_alpha")
        resolved = inherit(
            _from_sft_run(resolved),
            (*INHERITED, *of_adapter),
            binding=(*BINDING, *of_adapter),
        )
    problems = grpo_problems(*resolved.configs) + imports_that_nobody_gave(resolved)
    config, objective = finished(resolved, problems, "grpo").configs
    from rl.objective import ObjectiveConfig  # the command line is accepted, so torch may be loaded

    try:
        objective = ObjectiveConfig(**dataclasses.asdict(objective))
    except ValueError as error:  # a fork's check that the reading without torch could not make
        raise ConfigError(str(error).splitlines()) from error
    return dataclasses.replace(resolved, configs=(config, objective))


def _from_sft_run(resolved: Resolved) -> Resolved:
    """Fill in the newest finished SFT run, of the base that a flag or recipe names."""
    config: GRPOConfig = resolved.configs[0]
    if config.adapter_name_or_path:
        return resolved
    base, origin = config.model_name_or_path, resolved.origins["model_name_or_path"]
    of_base = f" of {base}" if base else ""
    command = ["python", "run_sft.py"]
    if base:
        command += [word for recipe in resolved.recipes for word in ("--recipe", recipe)]
    command += ["--model_name_or_path", base] if origin == "flag" else []
    newest = newest_finished_run(Path("runs"), "sft", base or None)
    if newest is None:
        raise UsageError(
            f"no finished SFT run{of_base} named runs/<time>-sft; run"
            f" `{shlex.join(command)}` first, or give --adapter_name_or_path (none for a fresh one)"
        )
    return resolved.with_value("adapter_name_or_path", str(newest), f"newest SFT run{of_base}")
