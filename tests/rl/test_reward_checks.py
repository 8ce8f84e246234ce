"""Protect that nothing but finite numbers leaves a reward, and that each failure is one line.

Checked: what rewards return and raise, what scales them, what they remember, in rollouts and in
evaluation; a reward that hangs; a run that ends at one with its state saved.

Run: pytest tests/rl/test_reward_checks.py
"""

from __future__ import annotations

import decimal
import fractions
import inspect
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data.answers import parse_answer
from data.labels import Target
from data.predictions import Prediction
from engine.config import UsageError
from engine.runtime import StepFailed
from engine.time_limit import TimeLimit
from rl.evaluation import with_rewards
from rl.logs import rollout_metrics
from rl.reward_checks import (
    Completed,
    Memory,
    RewardFailed,
    all_rewards,
    check_kept,
    check_memory,
    observe,
    trained_number,
)
from rl.reward_choice import build_rewards
from rl.rewards import HardReward, Mixture, NuancedReward, Reward, RewardFunction
from rl.settings import GRPOConfig
from tests.helpers.rollouts import sample

ANSWER = parse_answer("<think>a</think><solution>Edema</solution>")
TARGET = Target(frozenset({"Edema"}))
WHICH = Completed("e7", "<think>a\n\x1b[31m", 3, 4)
WHERE = "reward 'mine' of example 'e7', completion 3 of 4 ('<think>a\\n\\x1b[31m')"


class Returning(RewardFunction):
    """Return whatever it is given to return."""

    def __init__(self, value: Any):
        self.value = value

    def __call__(self, answer, target, completion_length):
        return self.value


class Raising(RewardFunction):
    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, answer, target, completion_length):
        raise self.error  # the line that is named


def rewarded(function: Callable[..., Any], limit: TimeLimit | None = None) -> Reward:
    limits = () if limit is None else (limit,)
    return all_rewards({"mine": function}, ANSWER, TARGET, 5, WHICH, *limits)["mine"]


def problem(function: Callable[..., Any], limit: TimeLimit | None = None) -> str:
    """Return what is said of a reward that fails, without the words that every line begins with."""
    with pytest.raises(RewardFailed) as failed:
        rewarded(function, limit)
    line = str(failed.value)
    assert line.startswith(f"{WHERE}: ") and line.isprintable()
    return line.removeprefix(f"{WHERE}: ")


# ---- what a reward returns -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5),
        np.array(0.5),
        fractions.Fraction(1, 2),
    ]
    + [decimal.Decimal("0.5"), torch.tensor(0.5, dtype=torch.bfloat16)],
)
def test_numbers_of_every_library_are_numbers(value):
    found = rewarded(Returning(Reward(value, {"a": value})))
    assert found == Reward(0.5, {"a": 0.5})
    assert type(found.total) is type(found.parts["a"]) is float


def test_truth_and_whole_numbers_are_numbers_too():
    assert rewarded(Returning(Reward(True, {"a": 2, "b": np.int64(-1)}))) == Reward(
        1.0, {"a": 2.0, "b": -1.0}
    )


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (None, "returned None, not a Reward with its total and its parts"),
        (0.5, "returned 0.5 (float), not a Reward with its total and its parts"),
        ("1", "returned '1' (str), not a Reward"),
        (Reward(None, {}), "its total is None, not a finite number"),
        (Reward("0.5", {}), "its total is '0.5' (str), not a finite number"),
        (Reward(math.nan, {}), "its total is nan (float), not a finite number"),
        (Reward(math.inf, {}), "its total is inf (float), not a finite number"),
        (Reward(-math.inf, {}), "its total is -inf (float), not a finite number"),
        (Reward(np.float32("nan"), {}), "its total is "),
        (Reward(torch.tensor(math.inf), {}), "its total is tensor(inf) (Tensor)"),
        (Reward(torch.ones(1), {}), "its total is tensor([1.]) (Tensor), not a finite number"),
        (Reward(torch.ones((), device="meta"), {}), "its total is tensor("),
        (Reward([1.0], {}), "its total is [1.0] (list), not a finite number"),
        (Reward(1j, {}), "its total is 1j (complex), not a finite number"),
        (Reward(np.complex64(1), {}), "its total is "),
        (Reward(10**400, {}), "not a finite number"),
        (Reward(1e16, {}), "its total is 1e+16, which is beyond 1e+15"),
        (Reward(1.0, None), "its parts are None, not a dictionary"),
        (Reward(1.0, [1.0]), "its parts are [1.0] (list), not a dictionary"),
        (Reward(0.0, {"a": math.nan}), "its part 'a' is nan (float), not a finite number"),
        (Reward(0.0, {"a": None}), "its part 'a' is None, not a finite number"),
        (Reward(1.0, {"a": 0.5, "b": 0.4}), "do not sum to its total 1.0"),
        (Reward(1.0, {"total": 1.0}), "a part is named 'total' (str)"),
        (Reward(1.0, {3: 1.0}), "a part is named 3 (int)"),
    ],
)
def test_everything_else_is_refused_by_name(returned, what):
    assert what in problem(Returning(returned))


def test_parts_may_be_missing_or_rounded():
    assert rewarded(Returning(Reward(0.5, {}))) == Reward(0.5, {})
    in_fp32 = {"a": float(np.float32(0.1)), "b": float(np.float32(0.2))}
    assert rewarded(Returning(Reward(0.3, in_fp32))).total == 0.3


def test_the_rewards_of_the_paper_pass_unchanged_to_the_bit():
    for function in (HardReward(), NuancedReward({"Edema": 0.3})):
        for text in ("<think>a</think><solution>Edema, Fracture</solution>", "x", ""):
            answer = parse_answer(text)
            [found] = all_rewards({"r": function}, answer, TARGET, 5, WHICH).values()
            assert found == function(answer, TARGET, 5)


# ---- what it raises ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ZeroDivisionError("division by zero"), "raised ZeroDivisionError: division by zero in"),
        (KeyError("two\nlines"), "raised KeyError: 'two\\nlines' in"),
        (ValueError("two\nlines \x1b[31m"), "raised ValueError: two lines \\x1b[31m in"),
        (StopIteration(), "raised StopIteration in"),
        (GeneratorExit(), "raised GeneratorExit in"),
        (SystemExit(0), "raised SystemExit: 0 in"),
        (MemoryError(), "raised MemoryError in"),
    ],
)
def test_an_exception_is_told_with_its_line_in_the_file_of_the_reward(error, what):
    lines, first = inspect.getsourcelines(Raising)
    number = first + next(i for i, line in enumerate(lines) if "the line that is named" in line)
    assert problem(Raising(error)) == f"{what} test_reward_checks.py, line {number}"


def test_an_exception_deep_in_a_library_is_told_with_the_line_of_the_reward():
    def mine(answer, target, length):
        return json.loads("{")

    assert problem(mine).endswith(f"test_reward_checks.py, line {mine.__code__.co_firstlineno + 1}")


def test_a_reward_that_cannot_be_called_so_is_told():
    assert problem(lambda answer: None).startswith("raised TypeError: ")
    assert problem(None).startswith("raised TypeError: 'NoneType' object is not callable")


def test_ctrl_c_is_no_failure_of_the_reward():
    with pytest.raises(KeyboardInterrupt):
        rewarded(Raising(KeyboardInterrupt()))


def test_a_reward_that_hangs_is_told_with_its_line():
    def slow(answer, target, length):
        time.sleep(60)

    told = problem(slow, TimeLimit(0.1))
    assert told == (
        "did not return within 0.1 s in test_reward_checks.py, line"
        f" {slow.__code__.co_firstlineno + 1}; raise --reward_timeout if it may take longer (0 for"
        " no limit)"
    )


# ---- what scales it ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scaled", "what"),
    [
        (lambda reward: None, "returned None, not a finite number"),
        (lambda reward: math.nan, "returned nan (float), not a finite number"),
        (lambda reward: 1 / 0, "raised ZeroDivisionError: division by zero in test_reward_checks"),
        (lambda reward: reward.total * 1e16, "returned 1e+16, which is beyond 1e+15"),
    ],
)
def test_the_number_that_is_trained_on_is_checked_too(scaled, what):
    function = HardReward()
    function.scaled = scaled
    with pytest.raises(RewardFailed) as failed:
        trained_number("mine", function, Reward(1.0, {}), WHICH)
    assert str(failed.value).startswith(f"scaled() of {WHERE}: {what}")


# ---- in an evaluation ----------------------------------------------------------------------------
def test_an_evaluation_checks_rewards_in_the_same_way():
    row = {
        "id": "e9",
        "patient_id": "p1",
        "dataset": "site",
        "labels": ["Edema"],
        "completion": "no answer",
        "completion_length": 2,
    }
    functions = {"hard": HardReward(), "mine": Returning(Reward(math.nan, {}))}
    with pytest.raises(StepFailed) as failed:
        with_rewards([Prediction.from_row(row)], functions, "hard", "completion")
    assert str(failed.value) == (
        "reward 'mine' of example 'e9', completion ('no answer'): its total is nan (float), not a"
        " finite number"
    )


# ---- what it remembers ---------------------------------------------------------------------------
class Remembering(RewardFunction):
    def __init__(self, state: Any, loaded: Callable[[Any], None] = lambda state: None):
        self.state, self.loaded = state, loaded

    def state_dict(self):
        return self.state() if callable(self.state) else self.state

    def load_state_dict(self, state):
        self.loaded(state)


def raises(*arguments: Any) -> None:
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (Remembering({1, 2}), "state_dict() of reward 'mine': JSON cannot hold {1, 2} (set)"),
        (Remembering({"a": torch.ones(1)}), "state_dict() of reward 'mine': JSON cannot hold"),
        (Remembering({"a": "\ud800"}), "state_dict() of reward 'mine': JSON cannot hold"),
        (Remembering(raises), "state_dict() of reward 'mine': raised ZeroDivisionError: no in"),
        (Remembering({}, raises), "load_state_dict() of reward 'mine': raised ZeroDivisionError"),
    ],
)
def test_a_memory_that_no_checkpoint_can_hold_is_told_before_the_run(function, what):
    with pytest.raises(UsageError) as refused:
        check_memory({"mine": function})
    assert str(refused.value).startswith(what)
    assert "a checkpoint must hold what a reward remembers" in str(refused.value)


def test_a_memory_that_does_not_come_back_is_told_before_the_run():
    class ByNumber(RewardFunction):
        counts = {1: 5}

        def state_dict(self):
            return {"sum": sum(self.counts.get(key, 0) for key in range(9))}

        def load_state_dict(self, state):
            self.counts = state  # {"sum": 5} has no number among its keys

    with pytest.raises(UsageError, match=r"reward 'mine' remembers .*0.* it has taken over .*5"):
        check_memory({"mine": ByNumber()})


def test_the_rewards_of_the_paper_remember_well(monkeypatch):
    functions = build_rewards(GRPOConfig(), [])
    functions["nuanced"].observe([ANSWER], [0])
    before = functions["nuanced"].state_dict()
    check_memory(functions)
    assert functions["nuanced"].state_dict() == before
    monkeypatch.setattr(NuancedReward, "state_dict", lambda self: {1, 2})
    with pytest.raises(UsageError, match="reward 'nuanced': JSON cannot hold"):
        build_rewards(GRPOConfig(), [])


def test_what_a_rollout_adds_to_a_memory_is_checked_in_its_step():
    class Growing(Remembering):
        def observe(self, answers, groups=None):
            self.state = {"answers": set(answers)}

    with pytest.raises(RewardFailed, match=r"state_dict\(\) of reward 'mine': JSON cannot hold"):
        observe({"mine": Growing({})}, [ANSWER], [0], [TARGET])
    failing = HardReward()
    failing.observe = raises
    with pytest.raises(RewardFailed, match=r"observe\(\) of reward 'mine': raised ZeroDivisionErr"):
        observe({"mine": failing}, [ANSWER], [0], [TARGET])


def test_a_reward_is_given_the_targets_where_it_names_them():
    seen = []

    class OfTwo(RewardFunction):
        """As rewards were written before targets were given."""

        def observe(self, answers, groups=None):
            seen.append((answers, groups))

    class OfThree(RewardFunction):
        def observe(self, answers, groups=None, targets=None):
            seen.append((answers, groups, targets))

    observe({"two": OfTwo(), "three": OfThree(), "none": HardReward()}, [ANSWER], [0], [TARGET])
    assert seen == [([ANSWER], [0]), ([ANSWER], [0], [TARGET])]


# ---- mixtures ------------------------------------------------------------------------------------
def test_a_mixture_adds_up_what_each_would_be_trained_on():
    # Edema of {Edema}: Eq. 3 gives 1 less 0.1 for 5 tokens. Eq. 4 gives 150 points, 1.5 as trained
    # on. 0.9 - 0.2 x 1.5 = 0.6, of which --reward_scale 3 makes 1.8.
    mixture = Mixture({"hard": 1.0, "nuanced": -0.2}, scale=3.0)
    functions = {"hard": HardReward(), "nuanced": NuancedReward({}), "mixture": mixture}
    found = all_rewards(functions, ANSWER, TARGET, 5, WHICH)["mixture"]
    assert found.parts == pytest.approx({"hard": 0.9, "nuanced": -0.3})
    assert found.total == pytest.approx(0.6)
    assert trained_number("mixture", mixture, found, WHICH) == pytest.approx(1.8)


def test_a_mixture_asks_each_reward_once():
    calls = []

    class Counted(HardReward):
        def __call__(self, answer, target, completion_length):
            calls.append(answer)
            return super().__call__(answer, target, completion_length)

    all_rewards({"one": Counted(), "mixture": Mixture({"one": 0.5})}, ANSWER, TARGET, 5, WHICH)
    assert len(calls) == 1


def test_what_scales_a_part_of_a_mixture_is_checked_by_its_name():
    function = HardReward()
    function.scaled = lambda reward: None
    with pytest.raises(RewardFailed) as failed:
        all_rewards({"mine": function, "mixture": Mixture({"mine": 1.0})}, ANSWER, TARGET, 5, WHICH)
    assert str(failed.value).startswith(f"scaled() of {WHERE}: returned None, not a finite number")


def test_a_memory_that_is_noted_does_not_change_with_the_reward():
    class Counting(RewardFunction):
        counts = {"a": 1}

        def state_dict(self):
            return self.counts

        def load_state_dict(self, state):
            self.counts = state

    function = Counting()
    noted = Memory("mine", function).state_dict()
    function.counts["a"] += 1
    Memory("mine", function).load_state_dict(noted)
    assert function.counts == {"a": 1}


# ---- what a checkpoint brings, and what is logged ------------------------------------------------
def test_a_kept_rollout_is_looked_at():
    check_kept("e1", 1.0, {"mine": Reward(1.0, {"a": 1.0})})
    with pytest.raises(RewardFailed, match=r"example 'e1': its scaled reward is nan \(float\)"):
        check_kept("e1", math.nan, {})
    with pytest.raises(RewardFailed, match=r"example 'e1': its total is inf \(float\)"):
        check_kept("e1", 1.0, {"mine": Reward(math.inf, {})})


def test_a_part_that_some_completions_lack_counts_as_nothing_there():
    # 1 and 3 of four completions: means 0.25 and 0.75
    parts = [{"a": 1.0}, {"b": 3.0}, {}, {}]
    samples = [
        sample(i // 2, 0.0, rewards={"mine": Reward(sum(part.values()), part)})
        for i, part in enumerate(parts)
    ]
    metrics = rollout_metrics(samples)
    assert (metrics["rewards/mine/a"], metrics["rewards/mine/b"]) == (0.25, 0.75)
