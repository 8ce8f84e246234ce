"""Give an evaluation of the policy its rewards, log it, and note whether it is the best so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.predictions import Prediction
from engine.run import TrainerState
from engine.time_limit import TimeLimit
from engine.tracking import RunLogger
from rl.conditions import parse_combination
from rl.reward_checks import UNLIMITED, Completed, all_rewards, trained_number
from rl.rewards import RewardFunction, rewards_record
from rl.settings import GAPS, HOME, GRPOConfig

# of the evaluated metrics
LOWER_IS_BETTER = (
    *(name for name in GAPS if name != "gain_shared"),
    "fail_rate",
    "invalid_rate",
    "unknown_rate",
    "no_label_rate",
    "silenced_labels",
)


def with_rewards(
    predictions: Sequence[Prediction],
    reward_functions: Mapping[str, RewardFunction],
    trained_reward: str,
    length_of: str,
    limit: TimeLimit = UNLIMITED,
) -> tuple[list[Prediction], dict[str, float]]:
    """Give a data set's predictions their rewards -> (the predictions, the rewards' means).

    Each prediction gets "rewards" as completions.jsonl has them: {name: {"total", its parts}}. Of
    the means, `rewards/<name>/mean` is in the reward's own units, `reward` as it is trained on.
    Nothing is observed: the windows stay those of the rollouts.

    trained_reward: name of the reward that is trained on.
    length_of: the length that rewards are given, a value of --length_of. For "text" each prediction
    has "text_length" among its fields, as `eval.decode` notes it.
    limit: of each call of a reward.

    Raises RewardFailed for a reward that is no finite number.
    """
    trained, number = reward_functions[trained_reward], len(predictions)
    rewarded = []
    means: dict[str, float] = defaultdict(float)
    for prediction in predictions:
        length = prediction.completion_length or 0  # never unknown: the sampler has counted
        if length_of == "text":
            length = prediction.extra["text_length"]
        which = Completed(prediction.id, prediction.completion)
        rewards = all_rewards(
            reward_functions, prediction.answer, prediction.target, length, which, limit
        )
        for name, reward in rewards.items():
            means[f"rewards/{name}/mean"] += reward.total / number
        scaled = trained_number(trained_reward, trained, rewards[trained_reward], which, limit)
        means["reward"] += scaled / number
        rewarded.append(prediction.with_extra(rewards=rewards_record(rewards)))
    return rewarded, dict(means)


def rewards_of(
    config: GRPOConfig,
    reward_functions: Mapping[str, RewardFunction],
    should_stop: Callable[[], bool] = lambda: False,
) -> Callable[[list[Prediction]], tuple[list[Prediction], dict[str, Any]]]:
    """Make the function that gives an evaluation its rewards, as `with_rewards` does.

    should_stop: a reward that hangs is ended once it says so.
    """

    def annotate(predictions: list[Prediction]) -> tuple[list[Prediction], dict[str, Any]]:
        limit = TimeLimit(config.reward_timeout, should_stop)
        name, length_of = config.trained_reward, config.length_of
        return with_rewards(predictions, reward_functions, name, length_of, limit)

    return annotate


def record_evaluation(
    metrics: Mapping[str, Mapping[str, float]],
    gaps: Mapping[str, float],
    log: RunLogger,
    state: TrainerState,
    chosen: str | None,
) -> dict[str, float]:
    """Log the metrics of each set and the gaps between them, and note the best checkpoint.

    metrics: {set: its metrics}. gaps: those of GAPS that were measured, by `eval.since_start`.
    chosen: what the best is chosen by (--metric_for_best_model), None for the first set's macro_f1.
    Returns all metrics by NAME/METRIC, those of the first set by HOME too, and the gaps.
    """
    names = list(metrics)
    for name in names:
        log.scalars(state.global_step, metrics[name], split="eval", dataset=name, epoch=state.epoch)
    named = ({HOME: metrics[names[0]]} if names else {}) | dict(metrics)
    flat = {f"{name}/{key}": value for name in named for key, value in named[name].items()}
    if gaps:
        log.scalars(state.global_step, gaps, split="eval", epoch=state.epoch)
    flat |= gaps
    if names:
        combination = parse_combination(chosen or f"{names[0]}/macro_f1")
        terms = combination.terms
        single = terms[0][1].rpartition("/")[2] if len(terms) == 1 else None
        state.record_evaluation(
            combination.value(flat), greater_is_better=single not in LOWER_IS_BETTER
        )
    return flat
