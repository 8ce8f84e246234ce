"""Protect what runs are judged by.

Checked: trade-offs of metrics, conditions that warn and stop, how they count.

Run: pytest tests/rl/test_conditions.py
"""

from __future__ import annotations

import math

import pytest

from rl.conditions import Watch, parse_combination, parse_condition


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl", 3.0),
        ("site-a/macro_f1", 0.5),
        ("2*kl", 6.0),
        ("site-a/macro_f1 - 0.5*gap", 0.5 - 0.5 * 0.2),
        ("site-a/macro_f1 + .25*kl - gap", 0.5 + 0.75 - 0.2),
    ],
)
def test_combinations_by_hand(text, expected):
    assert parse_combination(text).value(
        {"kl": 3.0, "site-a/macro_f1": 0.5, "gap": 0.2}
    ) == pytest.approx(expected, abs=1e-15)


def test_a_combination_of_something_not_measured_has_no_value():
    assert parse_combination("kl + gap").value({"kl": 1.0}) is None
    assert parse_combination("kl + gap").value({"kl": 1.0, "gap": None}) is None


@pytest.mark.parametrize(
    "text", ["", "a +", "a * b", "2 kl", "*kl", "a -- b", "-2*kl", "a/macro_f1 & b", "x+ y"]
)
def test_text_that_is_no_combination(text):
    with pytest.raises(ValueError, match="is no metric; write NAME or WEIGHT"):
        parse_combination(text)


@pytest.mark.parametrize(
    ("text", "above", "bound", "times"),
    [
        ("gap>0.05", True, 0.05, 1),
        ("b/macro_f1 < 0.3", False, 0.3, 1),
        ("monitors/hacking>1 for 3", True, 1.0, 3),
        ("reward<-1e-2", False, -0.01, 1),
    ],
)
def test_conditions(text, above, bound, times):
    condition = parse_condition(text)
    assert (condition.above, condition.bound, condition.times) == (above, bound, times)
    assert condition.holds(bound + 0.01) is above and condition.holds(bound - 0.01) is not above
    assert not condition.holds(bound) and condition.holds(math.nan)


@pytest.mark.parametrize(
    "text",
    [
        "gap",
        "gap>",
        ">1",
        "gap>x",
        "gap>nan",
        "gap>inf",
        "gap>1 for",
        "gap>1 for 0",
        "gap>1 for two",
        "gap=1",
        "gap>=1",
    ],
)
def test_text_that_is_no_condition(text):
    with pytest.raises(ValueError):
        parse_condition(text)


def test_a_condition_is_told_once_when_its_row_is_complete_and_again_after_a_break():
    watch = Watch(["kl>1 for 2", "gap<0"])
    told = [
        watch.check(metrics)
        for metrics in (
            {"kl": 2.0},
            {"gap": -0.5},
            {"kl": 3.0},
            {"kl": 4.0},
            {"kl": 0.0, "gap": -0.1},
            {"kl": 2.0, "gap": 0.0},
            {"kl": 2.0, "gap": -1.0},
        )
    ]
    # the evaluation between them does not break the row; the third 'kl>1' is no news; after the 0
    # the row starts again
    assert told == [
        [],
        ["gap<0: -0.5"],
        ["kl>1 for 2: 3"],
        [],
        [],
        [],
        ["kl>1 for 2: 2", "gap<0: -1"],
    ]


def test_a_condition_that_is_given_twice_counts_a_check_once():
    watch = Watch(["kl>1 for 2", "kl>1 for 2"])
    assert [watch.check({"kl": 2.0}) for _ in range(3)] == [[], ["kl>1 for 2: 2"], []]


def test_a_condition_on_what_has_names_is_told_once_for_each_name():
    watch = Watch(["silent>0", "silent>1 for 2", "silent<1"])
    told = []
    for names in ([], ["a"], ["a", "b"], ["a", "b"], [], ["b"], ["b", "c"], ["c", "d"]):
        before = watch.state_dict()
        told.append(watch.check({"silent": float(len(names))}, {"silent": names}))
        copy = Watch(["silent>0", "silent>1 for 2", "silent<1"])
        copy.load_state_dict(before)  # unchanged by the check, and enough to make it again
        assert copy.check({"silent": float(len(names))}, {"silent": names}) == told[-1]
        assert copy.state_dict() == watch.state_dict()
    assert told == [
        ["silent<1: 0"],  # nothing to name: as any condition
        ["silent>0: 1 (a)"],
        ["silent>0: 2 (a, b)"],
        ["silent>1 for 2: 2 (a, b)"],
        ["silent<1: 0"],
        [],  # b once more
        ["silent>0: 2 (b, c)"],
        ["silent>0: 2 (c, d)", "silent>1 for 2: 2 (c, d)"],
    ]


def test_counts_survive_a_checkpoint_and_leave_with_their_condition():
    watch = Watch(["kl>1 for 2", "gap<0"])
    watch.check({"kl": 2.0})
    resumed, other = Watch(["kl>1 for 2"]), Watch(["kl>1 for 3"])
    resumed.load_state_dict(watch.state_dict())
    other.load_state_dict(watch.state_dict())
    assert resumed.check({"kl": 2.0}) == ["kl>1 for 2: 2"] and other.check({"kl": 2.0}) == []
    assert set(other.held) == {"kl>1 for 3"}
