"""Protect a reward of one's own: the walk-through of rl/README.md as printed, and as a patch.

Run: pytest tests/rl/test_reward_forks.py
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from data.answers import parse_answer
from data.labels import Target
from rl.reward_choice import REGISTERED
from tests.helpers.patches import REWARD_FORKS, patched_files
from tests.helpers.repository import ROOT
from tests.helpers.runs import grpo, lines, speak, train_log

# F2 = 5 TP / (4 true + said). {Edema, Fracture, nodule} said of {Edema}: 5 / (4 + 3). {Edema} said
# of {Edema, Fracture}: 5 / (8 + 1). Nothing of nothing is 1, an answer without reasoning 0.
CASES = [
    ("<think>x</think><solution>Edema, Fracture, nodule</solution>", ("Edema",), 5 / 7),
    ("<think>x</think><solution>Edema</solution>", ("Edema", "Fracture"), 5 / 9),
    ("<think>x</think><solution></solution>", (), 1.0),
    ("<solution>Edema</solution>", ("Edema",), 0.0),
]


def test_the_walk_through_runs_as_printed(tiny_sft_run, tiny_data, tmp_path, monkeypatch):
    page = (ROOT / "rl/README.md").read_text(encoding="utf-8").partition("### Your reward")[2]
    [program] = re.findall(r"```python\n(# my_rewards.py\n.*?)```", page, re.DOTALL)
    [command] = re.findall(r"```\npython run_grpo.py (--reward .*)\n```", page)
    assert len(program.splitlines()) <= 15
    speak(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(program, encoding="utf-8")
    try:
        flags = ["--max_steps", "2", "--eval_steps", "9", *shlex.split(command)]
        assert grpo(tiny_sft_run("qwen2_5_vl"), tiny_data, tmp_path / "run", *flags) == 0
        reward = sys.modules["my_rewards"].ImageFBeta()
        for text, true, expected in CASES:
            found = reward(parse_answer(text), Target(frozenset(true)), 300)
            assert found.total == pytest.approx(expected)
    finally:
        sys.modules.pop("my_rewards", None)
    first = train_log(tmp_path / "run")[0]
    named = {f"rewards/{name}/mean" for name in (*REGISTERED, "ImageFBeta")}
    assert named <= first.keys() and "rewards/ImageFBeta/std" in first
    assert first["reward"] == pytest.approx(first["rewards/ImageFBeta/mean"])
    for row in lines(tmp_path / "run/completions.jsonl"):
        assert row["reward"] == row["rewards"]["ImageFBeta"]["total"]


def test_the_patch_registers_it(tmp_path):
    files = patched_files("image_fbeta")
    assert tuple(files) == REWARD_FORKS["image_fbeta"]
    shutil.copytree(ROOT / "rl", tmp_path / "rl", ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files.items():
        (tmp_path / path).write_text(text, encoding="utf-8")
    program = f"""
import json
from data.answers import parse_answer
from data.labels import Target
from rl.reward_choice import build_rewards
from rl.settings import GRPOConfig, set_metrics
config = GRPOConfig(
    reward="hard+0.5*image_fbeta", train_file=("a.jsonl",), adapter_name_or_path="a",
    per_device_train_batch_size=8, metric_for_best_model=None,
)
rewards = build_rewards(config, [])
reward = rewards["image_fbeta"]
values = [reward(parse_answer(t), Target(frozenset(l)), 9).total for t, l, _ in {CASES!r}]
print(json.dumps([list(rewards), values, "rewards/image_fbeta/mean" in set_metrics(config)]))
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, values, is_measured = json.loads(done.stdout)
    assert names == [*REGISTERED, "image_fbeta", "mixture"] and is_measured
    assert values == pytest.approx([expected for *_, expected in CASES])
