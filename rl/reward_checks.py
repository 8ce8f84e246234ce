"""Call the rewards, and let nothing through that is no reward.

A reward that raises, hangs, or returns anything but finite numbers ends the step, in training and
in evaluation alike: silently it would be an advantage of 0, or a checkpoint that no run can go on
from. One line names the reward, the example, the completion and the value.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
import reprlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import engine.time_limit
from data.answers import Answer
from data.labels import Target
from engine.config import UsageError
from engine.runtime import StepFailed
from engine.time_limit import TimedOut, TimeLimit
from rl.rewards import Mixture, Reward, RewardFunction

# Larger ones are a mistake: squares of gradients of this size, summed over the weights in fp32,
# would leave its range.
LARGEST = 1e15
# How far the parts may be from the total, as a share of their size: sums in fp32 are that far off.
PARTS_ROUNDING = 1e-4
UNLIMITED = TimeLimit()
OUR_FILES = (__file__, engine.time_limit.__file__)  # between a reward and who asks for it

Result = TypeVar("Result")


class RewardFailed(StepFailed):
    """Report a reward that failed on a completion."""


@dataclass(frozen=True)
class Completed:
    """Say which completion is rewarded.

    number: from 1 on, of the `count` completions of the example.
    """

    example: str
    text: str
    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        which = f" {self.number} of {self.count}" if self.count > 1 else ""
        return f"example {self.example!r}, completion{which} ({_begin(self.text)})"


# ---- one completion ------------------------------------------------------------------------------
def all_rewards(
    functions: Mapping[str, RewardFunction],
    answer: Answer,
    target: Target,
    length: int,
    completion: Completed,
    limit: TimeLimit = UNLIMITED,
) -> dict[str, Reward]:
    """Compute every reward of a completion -> {name: reward of plain, finite floats}.

    functions: a `Mixture` comes after the rewards that it mixes. length: of the completion in
    tokens, as `RewardFunction` takes it. limit: of each call.

    Numbers of numpy and 0-dimensional tensors are numbers. True and False are 1 and 0. Raises
    RewardFailed for everything else, and where a call raises or takes too long.
    """
    rewards: dict[str, Reward] = {}
    for name, function in functions.items():
        where = f"reward {name!r} of {completion}"
        if isinstance(function, Mixture):
            returned = function.of(
                {
                    part: trained_number(part, functions[part], rewards[part], completion, limit)
                    for part in function.weights
                }
            )
        else:
            returned = _called(function, (answer, target, length), where, limit)
        try:
            rewards[name] = _checked(returned)
        except ValueError as error:
            raise RewardFailed(f"{where}: {error}") from None
    return rewards


def trained_number(
    name: str,
    function: RewardFunction,
    reward: Reward,
    completion: Completed,
    limit: TimeLimit = UNLIMITED,
) -> float:
    """Scale a reward to the number that advantages are computed from.

    Raises RewardFailed as `all_rewards` does.
    """
    where = f"scaled() of reward {name!r} of {completion}"
    returned = _called(function.scaled, (reward,), where, limit)
    try:
        return _number(returned)
    except ValueError as error:
        raise RewardFailed(f"{where}: returned {error}") from None


def _checked(returned: Any) -> Reward:
    """Return a reward of plain floats. Raises ValueError saying what is wrong with it."""
    if not isinstance(returned, Reward):
        raise ValueError(f"returned {_shown(returned)}, not a Reward with its total and its parts")
    total, parts = _named("total", returned.total), returned.parts
    if not isinstance(parts, Mapping):
        raise ValueError(f"its parts are {_shown(parts)}, not a dictionary")
    for name in parts:
        if not isinstance(name, str) or name == "total":
            raise ValueError(f"a part is named {_shown(name)}; name it by another word")
    numbers_of = {name: _named(f"part {name!r}", value) for name, value in parts.items()}
    size = math.fsum(map(abs, numbers_of.values()))
    difference = abs(math.fsum(numbers_of.values()) - total)
    if parts and difference > PARTS_ROUNDING * max(size, abs(total)):
        raise ValueError(f"its parts {_shown(numbers_of)} do not sum to its total {total!r}")
    return dataclasses.replace(returned, total=total, parts=numbers_of)


def _named(what: str, value: Any) -> float:
    try:
        return _number(value)
    except ValueError as error:
        raise ValueError(f"its {what} is {error}") from None


def _number(value: Any) -> float:
    """Turn a number of any library into a float. Raises ValueError with the value's description."""
    refused = ValueError(f"{_shown(value)}, not a finite number")
    no_number = isinstance(value, str | bytes) or not hasattr(type(value), "__float__")
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    try:
        if no_number or is_complex or tuple(getattr(value, "shape", ())) != ():
            raise refused
        number = float(value)
    except Exception:  # of many classes: an int beyond floats, a tensor without a value
        raise refused from None
    if not math.isfinite(number):
        raise refused
    if abs(number) > LARGEST:
        raise ValueError(f"{number!r}, which is beyond {LARGEST:g}: a mistake, or another unit")
    return number


def check_kept(example: str, scaled: float, rewards: Mapping[str, Reward]) -> None:
    """Look at the rewards of a completion that a checkpoint holds. Raises RewardFailed."""
    try:
        _named("scaled reward", scaled)
        for reward in rewards.values():
            _checked(reward)
    except ValueError as error:
        raise RewardFailed(f"the reward of example {example!r}: {error}") from None


# ---- what rewards remember -----------------------------------------------------------------------
def observe(
    functions: Mapping[str, RewardFunction],
    answers: Sequence[Answer],
    groups: Sequence[int],
    targets: Sequence[Target],
    limit: TimeLimit = UNLIMITED,
) -> None:
    """Let every reward remember a rollout: its answers, the image of each, and its labels.

    A reward whose own `observe` does not name `targets` is not given them.

    Raises RewardFailed where that fails, or leaves what no checkpoint could hold.
    """
    for name, function in functions.items():
        known = (answers, groups, targets) if _names_targets(function) else (answers, groups)
        _called(function.observe, known, f"observe() of reward {name!r}", limit)
        _state(name, function, limit)


def _names_targets(function: RewardFunction) -> bool:
    try:
        return "targets" in inspect.signature(function.observe).parameters
    except (TypeError, ValueError):  # not to be looked at: it is called as it always was
        return False


def check_memory(functions: Mapping[str, RewardFunction]) -> None:
    """See before a run that a checkpoint can hold what the rewards remember, and give it back.

    Each is given its own state. Raises UsageError where one of their methods raises, where JSON
    cannot hold the state, or where a reward has another state after it has taken one over.
    """
    for name, function in functions.items():
        try:
            text = _state(name, function, UNLIMITED)
            take_over(name, function, json.loads(text))
            again = _state(name, function, UNLIMITED)
        except RewardFailed as error:
            raise UsageError(f"{error}; a checkpoint must hold what a reward remembers") from error
        if again != text:
            raise UsageError(
                f"reward {name!r} remembers {_begin(again)} once it has taken over {_begin(text)};"
                " load_state_dict() must take what state_dict() returns, as JSON holds it (keys are"
                " text, tuples are lists)"
            )


@dataclass(frozen=True)
class Memory:
    """Note what a reward remembers, and give it back, for a step that may have to be undone.

    It is noted as text: a reward may return the very dictionary that it goes on changing.
    """

    name: str
    function: RewardFunction

    def state_dict(self) -> str:
        """Return the state as JSON."""
        return _state(self.name, self.function, UNLIMITED)

    def load_state_dict(self, state: str) -> None:
        """Give the reward a state back."""
        take_over(self.name, self.function, json.loads(state))


def take_over(name: str, function: RewardFunction, state: Any) -> None:
    """Give a reward the state of a checkpoint. Raises RewardFailed where it does not take it."""
    _called(function.load_state_dict, (state,), f"load_state_dict() of reward {name!r}", UNLIMITED)


def _state(name: str, function: RewardFunction, limit: TimeLimit) -> str:
    where = f"state_dict() of reward {name!r}"
    state = _called(function.state_dict, (), where, limit)
    try:
        text = json.dumps(state, ensure_ascii=False)
        text.encode()
    except Exception as error:
        raise RewardFailed(f"{where}: JSON cannot hold {_shown(state)} ({_text(error)})") from None
    return text


# ---- calls ---------------------------------------------------------------------------------------
def _called(
    function: Callable[..., Result], arguments: tuple[Any, ...], where: str, limit: TimeLimit
) -> Result:
    """Call a user's function. Ctrl-C passes through. Raises RewardFailed for all else it raises.

    Also for SystemExit, with which a reward would end the run as if all were well.
    """
    try:
        return limit.call(function, *arguments)
    except KeyboardInterrupt:
        raise
    except TimedOut as error:
        raise RewardFailed(
            f"{where}: did not return within {limit.seconds:g} s{_line(function, error)}; raise"
            " --reward_timeout if it may take longer (0 for no limit)"
        ) from error
    except BaseException as error:
        raise RewardFailed(f"{where}: {raised(function, error)}") from error


def raised(function: Callable[..., Any] | None, error: BaseException) -> str:
    """Say what a user's code has raised, and in which line, in one line of text."""
    return f"raised {_text(error)}{_line(function, error)}"


def _line(function: Callable[..., Any] | None, error: BaseException) -> str:
    """Say in which line of the reward's own file an error arose, or else where it did."""
    method = type(function).__call__ if callable(function) else None
    code = getattr(function, "__code__", None) or getattr(method, "__code__", None)
    file = getattr(code, "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    others = [
        frame
        for frame in frames
        if frame.filename not in OUR_FILES and not frame.filename.startswith("<frozen importlib")
    ]
    found = own or others  # neither: it could not even be called
    return f" in {Path(found[-1].filename).name}, line {found[-1].lineno}" if found else ""


def _text(error: BaseException) -> str:
    return _one_line("".join(traceback.format_exception_only(error)))


def _begin(text: str) -> str:
    """Show the beginning of a text, escaped."""
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}..."


def _shown(value: Any) -> str:
    """Show a value of any type, with its type."""
    if value is None:
        return "None"
    return f"{_one_line(reprlib.repr(value))} ({type(value).__name__})"


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    plain = "".join(char if char.isprintable() else repr(char)[1:-1] for char in joined)
    return plain if len(plain) <= 300 else f"{plain[:300]}..."
