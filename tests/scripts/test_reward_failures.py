"""Protect runs whose reward fails: they end with the last whole step saved, and go on exactly.

Run: pytest tests/scripts/test_reward_failures.py
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable

import pytest

import engine.time_limit
import run_grpo
from engine.runtime import main_guard
from rl.rewards import HardReward, Reward
from tests.helpers.runs import assert_same_run, grpo, lines, record, speak

# Rollouts of 2 groups of 4 completions, for two steps each: step 3 begins the second.
FLAGS = ["--max_steps", "4", "--eval_steps", "9"]
OF_A_ROLLOUT = 8


def fail_at(monkeypatch, call: int, fail: Callable[[], object]) -> None:
    """Let the hard reward fail once, at its `call`-th call of a rollout, from 1 on."""
    reward, calls = HardReward.__call__, []

    def failing(self, answer, target, completion_length):
        calls.append(1)
        if len(calls) == call:
            return fail()
        return reward(self, answer, target, completion_length)

    monkeypatch.setattr(HardReward, "__call__", failing)


def raising() -> None:
    raise KeyError("Edema")


@pytest.fixture(scope="module")
def straight_run(tiny_sft_run, tiny_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS) == 0
    return run


def go_on(run, straight_run) -> None:
    assert run_grpo.main(["--resume_from_checkpoint", str(run)]) == 0
    assert_same_run(straight_run, run)


def test_a_reward_that_raises_costs_no_finished_step(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, straight_run, capsys
):
    speak(monkeypatch)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(patch, OF_A_ROLLOUT + 7, raising)
        adapter = tiny_sft_run("qwen2_5_vl")
        assert main_guard(lambda: grpo(adapter, tiny_data, run, *FLAGS)) == 1
    second = lines(straight_run / "completions.jsonl")[OF_A_ROLLOUT + 6]
    [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told.startswith(
        f"error: reward 'hard' of example {second['id']!r}, completion 3 of 4"
        f" ({second['completion'][:60]!r}): raised KeyError: 'Edema' in test_reward_failures.py"
    )
    assert record(run / "last/trainer_state.json")["global_step"] == 2
    go_on(run, straight_run)


def test_a_reward_that_is_not_finite_never_reaches_the_log(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    speak(monkeypatch)
    run = tmp_path / "run"
    fail_at(monkeypatch, 1, lambda: Reward(math.nan, {}))
    adapter = tiny_sft_run("qwen2_5_vl")
    assert main_guard(lambda: grpo(adapter, tiny_data, run, *FLAGS)) == 1
    assert "its total is nan (float), not a finite number" in capsys.readouterr().err
    assert (
        not (run / "completions.jsonl").exists()
        and not (run / "adapter_model.safetensors").exists()
    )


def test_a_reward_that_fails_in_an_evaluation_ends_the_run_in_the_same_way(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    speak(monkeypatch)
    run = tmp_path / "run"
    fail_at(monkeypatch, 2, lambda: None)
    files = ["--validation_file", f"site={tiny_data}", "--no_vote_baseline"]
    adapter = tiny_sft_run("qwen2_5_vl")
    assert main_guard(lambda: grpo(adapter, tiny_data, run, *FLAGS, *files)) == 1
    told = capsys.readouterr().err
    assert "error: reward 'hard' of example 'e1', completion (" in told
    assert "returned None, not a Reward" in told
    assert record(run / "last/trainer_state.json")["global_step"] == 0


def test_a_signal_ends_a_reward_that_hangs(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, straight_run
):
    """And what it had done since the last step is done again."""
    speak(monkeypatch)
    monkeypatch.setattr(engine.time_limit, "GRACE", 0.2)
    monkeypatch.setattr(engine.time_limit, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(engine.time_limit, "_cut_off", False)

    def hang() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(600)

    run, began = tmp_path / "run", time.monotonic()
    with monkeypatch.context() as patch:
        fail_at(patch, OF_A_ROLLOUT + 1, hang)
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS) == 143
    assert time.monotonic() - began < 300
    assert record(run / "last/trainer_state.json")["global_step"] == 2
    go_on(run, straight_run)


def test_a_reward_that_hangs_ends_the_run_after_its_time(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, capsys
):
    speak(monkeypatch)
    monkeypatch.setattr(engine.time_limit, "_cut_off", False)
    fail_at(monkeypatch, 1, lambda: time.sleep(600))
    adapter, limit = tiny_sft_run("qwen2_5_vl"), ["--reward_timeout", "0.5"]
    run = tmp_path / "run"
    assert main_guard(lambda: grpo(adapter, tiny_data, run, *FLAGS, *limit)) == 1
    assert "did not return within 0.5 s in test_reward_failures.py" in capsys.readouterr().err
    assert record(run / "last/trainer_state.json")["global_step"] == 0
