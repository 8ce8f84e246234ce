"""Protect runs on a mixture with a reward of one's own, from the command line to the figures.

Checked: what is logged, that a stopped run goes on to the last bit by the command that it prints,
and that a run's folder makes nobody import anything.

Run: pytest tests/scripts/test_own_rewards.py
"""

from __future__ import annotations

import hashlib
import json
import sys

import pytest

import run_grpo
from engine.runtime import main_guard
from eval.figures import main as figures
from rl.reward_choice import REGISTERED
from rl.rewards import HardReward
from rl.settings import resolve_grpo
from tests.helpers.runs import assert_same_run, eval_log, grpo, lines, record, speak, train_log

REWARD = "fbeta + 0.5*hard - 2*own_for_test:Long"
MINE = '''
from rl.rewards import Reward, RewardFunction


class Long(RewardFunction):
    """One for each token, and nothing where `observe` (of two arguments) has seen nothing yet."""

    def __init__(self):
        self.seen = 0

    def __call__(self, answer, target, completion_length):
        return Reward(float(completion_length * (self.seen > 0)), {})

    def observe(self, answers, groups=None):
        self.seen += len(list(answers))

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
'''
# Rollouts of 2 groups of 4 completions, for two steps each: step 3 begins the second.
FLAGS = ["--max_steps", "4", "--eval_steps", "9", "--no_vote_baseline", "--reward", REWARD]


@pytest.fixture(scope="module")
def straight_run(tiny_sft_run, tiny_data, tmp_path_factory):
    """Make a whole run in a folder that has the module, and leave that folder's name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_for_test.py").write_text(MINE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        patch.chdir(folder)
        files = ["--validation_file", f"site={tiny_data}"]
        chosen = ["--metric_for_best_model", "site/rewards/mixture/mean"]
        run = folder / "run"
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS, *files, *chosen) == 0
    yield run
    sys.modules.pop("own_for_test", None)


def test_everything_is_logged_and_the_mixture_is_trained_on(straight_run):
    names = [*REGISTERED, "Long", "mixture"]
    logged = [row for row in train_log(straight_run) if "rewards/mixture/mean" in row]
    assert [row["step"] for row in logged] == [1, 3]
    for row in logged:
        means = {name: row[f"rewards/{name}/mean"] for name in names}
        # hard and Long as they are; fbeta is never trained on below -1, which only rows tell
        parts = {name: row[f"rewards/mixture/{name}"] for name in ("fbeta", "hard", "Long")}
        assert parts["hard"] == pytest.approx(means["hard"] / 2)
        assert parts["Long"] == pytest.approx(-2 * means["Long"])
        assert (
            row["reward"] == pytest.approx(means["mixture"]) == pytest.approx(sum(parts.values()))
        )
    assert logged[0]["rewards/Long/mean"] == 0 < logged[1]["rewards/Long/mean"]
    for row in lines(straight_run / "completions.jsonl"):
        rewards = row["rewards"]
        assert list(rewards) == names
        fbeta, hard = max(rewards["fbeta"]["total"], -1), rewards["hard"]["total"]
        expected = fbeta + 0.5 * hard - 2 * rewards["Long"]["total"]
        assert (
            row["reward"] == pytest.approx(expected) == pytest.approx(rewards["mixture"]["total"])
        )
    evaluated = [row for row in eval_log(straight_run) if "reward" in row]
    assert all(row["reward"] == row["rewards/mixture/mean"] for row in evaluated) and evaluated
    best = record(straight_run / "trainer_state.json")["best_metric"]
    assert best == max(row["rewards/mixture/mean"] for row in evaluated)


def test_the_files_of_a_run_tell_its_reward(straight_run, tmp_path, capsys):
    noted, file = record(straight_run / "config.json"), straight_run.parent / "own_for_test.py"
    assert noted["settings"]["reward"] == {"value": REWARD, "origin": "flag"}
    sha256 = hashlib.sha256(MINE.encode()).hexdigest()
    assert noted["reward_code"] == {"own_for_test": {"file": str(file), "sha256": sha256}}
    assert f"against a verifiable reward (`{REWARD}`)" in (straight_run / "README.md").read_text()
    assert figures([str(straight_run), "--output_dir", str(tmp_path / "pictures")]) == 0
    drawn = capsys.readouterr().out
    assert "training-" in drawn and "reward-parts-" in drawn


def test_it_goes_on_to_the_last_bit_by_the_command_that_it_prints(
    tiny_sft_run, tiny_data, tmp_path, monkeypatch, straight_run, capsys
):
    speak(monkeypatch)
    monkeypatch.chdir(straight_run.parent)
    run, reward, calls = tmp_path / "run", HardReward.__call__, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 24:  # 12 of the evaluation, 8 of the first rollout, 4 of the second
            raise KeyError
        return reward(self, *arguments)

    files = ["--validation_file", f"site={tiny_data}"]
    chosen = ["--metric_for_best_model", "site/rewards/mixture/mean"]
    with monkeypatch.context() as patch:
        patch.setattr(HardReward, "__call__", failing)
        command = (tiny_sft_run("qwen2_5_vl"), tiny_data, run, *FLAGS, *files, *chosen)
        assert main_guard(lambda: grpo(*command)) == 1
    assert record(run / "last/rewards.json")["Long"] == {"seen": 8}
    assert len(record(run / "last/rewards.json")["fbeta"]["images"]) == 2
    go_on = f"--resume_from_checkpoint {run} --reward '{REWARD}'"
    assert f"go on with: python run_grpo.py {go_on}" in capsys.readouterr().err
    # without the reward on the command line nothing is imported
    sys.modules.pop("own_for_test")
    assert main_guard(lambda: run_grpo.main(["--resume_from_checkpoint", str(run)])) == 2
    assert f"if it is yours, add --reward {REWARD}" in capsys.readouterr().err
    assert "own_for_test" not in sys.modules
    assert run_grpo.main(["--resume_from_checkpoint", str(run), "--reward", REWARD]) == 0
    assert_same_run(straight_run, run)


def test_a_folder_that_claims_a_flag_imports_nothing(straight_run, tmp_path, capsys):
    """A run that was ended before its first checkpoint tells the origins of its settings itself."""
    run = tmp_path / "run"
    run.mkdir()
    noted = record(straight_run / "config.json")
    noted.pop("finished", None)
    assert noted["settings"]["reward"]["origin"] == "flag"
    (run / "config.json").write_text(json.dumps(noted), encoding="utf-8")
    assert main_guard(lambda: resolve_grpo(["--resume_from_checkpoint", str(run)]) and 0) == 2
    assert "a run's folder does not decide what is imported" in capsys.readouterr().err
