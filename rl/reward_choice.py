"""Read --reward, and make the rewards of a run: the registered ones, those of one's own, a mixture.

hard                                    one reward by its name
hard+0.5*weighted                       a mixture: rewards with weights, joined by + and -
my_rewards:FBeta                        a class (or factory) FBeta of the module my_rewards
hard+0.1*my_rewards:Brief               a mixture with one

All registered rewards are computed and logged in every run. A reward of one's own is imported where
the user's own command or recipe names it, and never because a run's folder does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data.examples import Example
from data.hospitals import frequencies_by_hospital, label_frequencies
from engine.config import Resolved
from engine.reward_name import MIXTURE, reward_name
from rl.conditions import parse_combination
from rl.label_rewards import FBetaReward, WeightedReward
from rl.own_rewards import own_reward, reward_code
from rl.reward_checks import check_memory
from rl.rewards import HardReward, Mixture, NuancedReward, RewardFunction

if TYPE_CHECKING:
    from rl.settings import GRPOConfig

REGISTERED = ("hard", "nuanced", "weighted", "fbeta")  # made by `build_rewards`
CODE = "reward_code"  # the key of config.json
_NAME = r"\w[\w.]*(?::\w+)?"
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class RewardChoice:
    """Hold what --reward names.

    name: under which the reward that is trained on is logged. weights: {name of a reward: how much
    of it}. paths: {name: its import path}, of rewards of one's own.
    """

    name: str
    weights: Mapping[str, float]
    paths: Mapping[str, str]

    @property
    def logged(self) -> tuple[str, ...]:
        """List the rewards that a run with this choice logs, in their order."""
        return tuple(dict.fromkeys((*REGISTERED, *self.paths, self.name)))


@lru_cache(maxsize=64)
def reward_choice(text: str) -> RewardChoice:
    """Read a value of --reward. Raises ValueError, saying what is wrong, for any other text."""
    spaced = re.sub(r"\s*([-+])\s*", r" \1 ", re.sub(r"\s*\*\s*", "*", text))
    terms = parse_combination(spaced, name=_NAME, what="reward", joined="+ and -").terms
    weights, paths = {}, {}
    for weight, term in terms:
        name = reward_name(term)
        if ":" in term:
            paths[name] = _checked_path(term, name)
        elif name not in REGISTERED:
            near = difflib.get_close_matches(name, REGISTERED, 1)
            raise ValueError(
                f"there is no reward {name!r}{f'; did you mean {near[0]}?' if near else ''} (there"
                f" are {', '.join(REGISTERED)}; one of yours is MODULE:NAME)"
            )
        if not weight:
            raise ValueError(f"{term} has weight 0: leave it out")
        if name in weights:
            raise ValueError(f"{name} is named twice: add its weights up")
        weights[name] = weight
    return RewardChoice(reward_name(text), weights, paths)


def _checked_path(path: str, name: str) -> str:
    if _PATH.fullmatch(path) is None:
        raise ValueError(f"{path!r} is no import path; write MODULE:NAME, as my_rewards:FBeta")
    if name in (*REGISTERED, MIXTURE):
        raise ValueError(f"{path}: {name} is the name of a reward that there is; rename yours")
    return path


def reward_problems(text: str) -> list[str]:
    """Name what is wrong with a value of --reward, in one line, or in none."""
    try:
        reward_choice(text)
    except ValueError as error:
        return [f"--reward {text}: {error}"]
    return []


def imports_that_nobody_gave(resolved: Resolved) -> list[str]:
    """Refuse to import code because a run's folder names it, in one line, or in none.

    Whoever wrote the folder would decide what runs here. So the command has to say it again.
    """
    text, origin = resolved.configs[0].reward, resolved.origins["reward"]
    if ":" not in text or origin == "flag" or origin.startswith("recipe "):
        return []
    return [
        f"the run's reward is {text}, which imports code, and a run's folder does not decide what"
        f" is imported: if it is yours, add --reward {text}"
    ]


# ---- the rewards of a run ------------------------------------------------------------------------
def build_rewards(config: GRPOConfig, examples: Sequence[Example]) -> dict[str, RewardFunction]:
    """Make the rewards that a run computes, by the name under which they are logged.

    examples: the training data, whose label frequencies the rewards use, of each hospital its own.

    Raises UsageError for a reward of one's own that cannot be made, and for one whose memory no
    checkpoint could hold.
    """
    choice = reward_choice(config.reward)
    tables: dict[str, Any] = {
        "label_frequency": label_frequencies(examples),
        "by_hospital": frequencies_by_hospital(examples),
    }
    names = config.label_set.names
    rewards: dict[str, RewardFunction] = {
        "hard": HardReward(length_penalty=config.length_penalty, min_length=config.min_length),
        "nuanced": NuancedReward(**tables, labels=names),
        "weighted": WeightedReward(**tables),
        "fbeta": FBetaReward(**tables),
    }
    for name, path in choice.paths.items():
        rewards[name] = own_reward(path, tables | {"labels": names})
    if choice.name == MIXTURE:
        rewards[MIXTURE] = Mixture(choice.weights)
    if config.reward_scale is not None:
        rewards[choice.name].scale = config.reward_scale
    check_memory(rewards)
    return rewards


def with_reward_code(
    record: dict[str, Any], config: GRPOConfig, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Add to config.json of a run the files of its own rewards, and say which has changed.

    before: config.json of the checkpoint that the run goes on from, None for a new run.
    """
    code = reward_code(config.reward_choice.paths.values(), (before or {}).get(CODE) or {})
    return record | ({CODE: code} if code else {})
