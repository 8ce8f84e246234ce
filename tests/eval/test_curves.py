"""Protect what figures take out of a log.

Checked: the smoothing by hand, gaps, steps that come twice, equal panels, rewards of any name, the
gap that is drawn, and the ends of axes.

Run: pytest tests/eval/test_curves.py
"""

from __future__ import annotations

import math

import pytest

from data.files import write_jsonl
from eval.curves import (
    FIGURE_1,
    axis_limits,
    ema,
    evaluated_sets,
    gap_curve,
    panels_to_draw,
    part_names,
    reward_names,
    reward_panels,
    series,
    smoothing_for,
    training_runs,
)
from eval.folders import load_entry
from tests.helpers.reports import training_run

NAN = math.nan


def train(metric: str, *values: float | None) -> list[dict]:
    return [
        {"step": step, "split": "train", metric: value}
        for step, value in enumerate(values, start=1)
    ]


# ---- smoothing -----------------------------------------------------------------------------------
def test_the_moving_average_by_hand():
    # b = 0.95: s = 0.05, 0.1975, 0.242625 over 1 - b^t = 0.05, 0.0975, 0.142625
    assert ema([1.0, 3.0, 1.1]) == pytest.approx([1.0, 0.1975 / 0.0975, 0.242625 / 0.142625])
    # b = 0.5: s = 1, 2.5 over 0.5, 0.75
    assert ema([2.0, 4.0], smoothing=0.5) == pytest.approx([2.0, 2.5 / 0.75])
    assert ema([]) == [] and ema([3.0, 5.0], smoothing=0.0) == [3.0, 5.0]


def test_the_moving_average_of_a_constant_is_the_constant():
    assert ema([0.45] * 50) == pytest.approx([0.45] * 50)


def test_a_gap_counts_for_nothing_in_the_average():
    smoothed = ema([2.0, NAN, 4.0], smoothing=0.5)
    assert smoothed[0] == 2.0 and math.isnan(smoothed[1])
    assert smoothed[2] == pytest.approx(2.5 / 0.75)  # as without the gap


@pytest.mark.parametrize(
    "count, smoothing",
    [(4000, 0.95), (400, 0.95), (200, 0.9), (40, 0.5), (20, 0.0), (1, 0.0), (0, 0.0)],
)
def test_a_short_curve_is_smoothed_less(count, smoothing):
    # its memory 1 / (1 - b) is a twentieth of its values: 1 - 20/200 = 0.9
    assert smoothing_for(count) == pytest.approx(smoothing)


# ---- series --------------------------------------------------------------------------------------
def test_a_series_has_gaps_where_a_null_was_logged_and_nothing_where_nothing_was():
    log = [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "train", "loss": None},
        {"step": 2, "split": "eval", "loss": 9.0},
        {"step": 3, "split": "train"},
        {"step": 4, "split": "train", "loss": 1},
        {"step": 5, "split": "train", "loss": math.inf},
        {"step": 6, "split": "train", "loss": True},
        {"step": 7, "split": "train", "loss": 10**400},  # too large for a float
        {"step": 10**400, "split": "train", "loss": 1.0},
    ]
    steps, values = series(log, "loss")
    assert steps == [1, 2, 4, 5] and values[0] == 2.0 and values[2] == 1.0
    assert math.isnan(values[1]) and math.isnan(values[3])
    assert series(log, "loss", split="eval") == ([2], [9.0])


def test_a_step_that_comes_twice_counts_as_it_was_logged_last():
    log = train("loss", 3.0, 2.0) + [{"step": 1, "split": "train", "loss": 1.0}]
    assert series(log, "loss") == ([1, 2], [1.0, 2.0])


def test_evaluations_of_one_set_are_no_points_of_another_or_of_the_validation():
    log = [
        {"step": 5, "epoch": 1.0, "split": "eval", "loss": 0.4},
        {"step": 5, "split": "eval", "dataset": "a", "loss": 0.1, "macro_f1": 0.5},
        {"step": 5, "split": "eval", "dataset": "b", "macro_f1": 0.6},
        {"step": 5, "split": "eval", "gap": 0.1},
    ]
    assert series(log, "loss", split="eval", over="epoch") == ([1.0], [0.4])
    assert series(log, "macro_f1", split="eval", data_set="b") == ([5], [0.6])
    assert evaluated_sets(log) == ["a", "b"]


# ---- panels --------------------------------------------------------------------------------------
def test_a_panel_that_equals_another_is_drawn_once():
    same = [row | {"rewards/hard/mean": row["reward"]} for row in train("reward", 0.5, None, 0.7)]
    panels, left_out = panels_to_draw(reward_panels("hard"), {"r": same})
    assert [panel.metric for panel in panels] == ["reward"]
    assert left_out == [
        "Mean hard reward: the same curve as Total reward, as trained on.",
        "Mean completion length: not logged.",
    ]
    # in one run of two they differ: both are drawn
    other = [row | {"rewards/hard/mean": 2.0} for row in train("reward", 0.5)]
    panels, _ = panels_to_draw(reward_panels("hard"), {"r": same, "s": other})
    assert [panel.metric for panel in panels] == ["reward", "rewards/hard/mean"]


def test_training_and_validation_loss_are_two_panels_even_where_they_are_equal():
    log = train("loss", 1.0) + [{"step": 1, "epoch": 1, "split": "eval", "loss": 1.0}]
    assert panels_to_draw(FIGURE_1, {"r": log})[0] == list(FIGURE_1[1:])


def test_rewards_and_parts_of_any_name():
    log = [
        {
            "step": 1,
            "split": "train",
            "rewards/f/beta/mean": 1.0,
            "rewards/f/beta/std": 1.0,
            "rewards/f/beta/recall": 1.0,
            "rewards/hard/mean": 1.0,
        },
        {"step": 1, "split": "eval", "rewards/eval_only/mean": 1.0},
    ]
    assert reward_names(log) == ["f/beta", "hard"]
    assert part_names(log, "f/beta") == ["recall"] and part_names(log, "hard") == []


# ---- the gap -------------------------------------------------------------------------------------
def test_the_shared_gap_goes_before_the_other():
    log = [
        {"step": 0, "split": "eval", "gap": 0.0, "gap_shared": 0.0, "gap_shared_se": 0.0},
        {"step": 9, "split": "eval", "gap": 0.5, "gap_shared": -0.04, "gap_shared_se": 0.03},
        {"step": 12, "split": "eval", "gap": 0.5, "gap_shared": None},
    ]
    gap = gap_curve(log)
    assert gap.name == "gap_shared" and gap.steps == [0, 9, 12] and gap.values[:2] == [0.0, -0.04]
    assert gap.errors[:2] == [0.0, 0.03] and math.isnan(gap.values[2] + gap.errors[2])
    assert gap.reach == pytest.approx(0.1)  # |-0.04| + 2 x 0.03
    only = gap_curve([{"step": 3, "split": "eval", "gap": 0.25}])
    assert only.name == "gap" and only.reach == 0.25 and math.isnan(only.errors[0])
    assert gap_curve([{"step": 3, "split": "eval", "gap": None}]) is None


# ---- axes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "scale, values, ends",
    [
        ("share", [0.97, 0.98], (-0.01, 1.04)),
        ("share", [], (-0.01, 1.04)),
        ("zero", [50.0, 60.0], (-0.6, 62.4)),
        ("zero", [0.0, NAN], (-0.25, 1.0)),
        ("zero", [-1.0, 3.0], (-1.16, 3.16)),
        ("reward", [0.5, 0.6], (-0.01, 1.04)),
        ("reward", [-0.1, 0.6], (-0.144, 1.044)),
        ("reward", [-200.0, 100.0], (-212.0, 112.0)),
        ("reward", [20.0], (-0.2, 20.8)),
    ],
)
def test_the_ends_of_an_axis(scale, values, ends):
    # 4 % beyond the ends, 1 % below a 0 that nothing passes
    assert axis_limits(scale, values) == pytest.approx(ends)


# ---- runs ----------------------------------------------------------------------------------------
def test_a_run_that_two_entries_name_is_read_once(tmp_path):
    run = training_run(tmp_path / "r", "grpo")
    runs, problems = training_runs([load_entry(name, run) for name in ("last", "best")])
    assert [(r.name, r.stage, r.reward) for r in runs] == [("last", "grpo", "hard")]
    assert problems == []


def test_a_log_alone_says_what_kind_of_run_it_is(tmp_path):
    for name, row in {
        "x": {"loss": 1.0},
        "y": {"reward": 1.0, "rewards/mine/mean": 1.0},
        "z": {"reward": 1.0, "rewards/mine/mean": 1.0, "rewards/yours/mean": 2.0},
    }.items():
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "metrics.jsonl", [{"step": 1, "split": "train"} | row])
    runs, _ = training_runs([load_entry(name, tmp_path / name) for name in ("x", "y", "z")])
    # which of two rewards was trained on is not in a log
    assert [(run.stage, run.reward) for run in runs] == [
        ("sft", ""),
        ("grpo", "mine"),
        ("grpo", ""),
    ]
