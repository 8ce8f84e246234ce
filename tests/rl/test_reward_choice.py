"""Protect --reward: names, mixtures, and rewards of one's own by import path.

Checked: what each text means or why it is refused, what may be imported and by whose word, how a
reward of one's own is made, and that its file is noted.

Run: pytest tests/rl/test_reward_choice.py
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import pytest

from data.examples import Example
from data.labels import LABELS
from engine.config import Resolved, UsageError
from engine.reward_name import reward_name
from rl.own_rewards import own_reward
from rl.reward_choice import (
    REGISTERED,
    build_rewards,
    imports_that_nobody_gave,
    reward_choice,
    reward_problems,
    with_reward_code,
)
from rl.rewards import Mixture
from rl.settings import SET_METRICS, GRPOConfig, judging_problems, length_warning, set_metrics
from tests.helpers.rollouts import example, sample

MINE = '''
from rl.rewards import Reward, RewardFunction


class Brief(RewardFunction):
    """One point for an answer below `words` words."""

    def __init__(self, label_frequency, words=9, *, labels):
        self.label_frequency, self.words, self.labels = label_frequency, words, labels

    def __call__(self, answer, target, completion_length):
        return Reward(float(completion_length < self.words), {})


def made():
    return Brief({}, labels=())


def length(answer, target, completion_length):
    return 0.0


def raising():
    raise KeyError("Edema")


number = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of rewards into the current folder: `module("mine")` -> its file."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name: str, text: str = MINE):
        file = tmp_path / f"{name}.py"
        file.write_text(text, encoding="utf-8")
        written.append(name)
        return file

    yield write
    for name in written:
        sys.modules.pop(name, None)


def examples(*labels: str) -> list[Example]:
    return [example(f"e{i}", label) for i, label in enumerate(labels)]


# ---- what a text means ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "name", "weights"),
    [
        ("hard", "hard", {"hard": 1}),
        ("fbeta", "fbeta", {"fbeta": 1}),
        ("hard+0.5*weighted", "mixture", {"hard": 1, "weighted": 0.5}),
        (" hard + .5 * weighted ", "mixture", {"hard": 1, "weighted": 0.5}),
        ("2*hard-0.25*fbeta", "mixture", {"hard": 2, "fbeta": -0.25}),
        ("0.5*hard", "mixture", {"hard": 0.5}),
        ("my_rewards:FBeta", "FBeta", {"FBeta": 1}),
        ("hard-0.1*my.rewards:Brief", "mixture", {"hard": 1, "Brief": -0.1}),
    ],
)
def test_names_mixtures_and_paths(text, name, weights):
    choice = reward_choice(text)
    assert (choice.name, choice.weights) == (name, weights)
    assert reward_name(text) == name and reward_problems(text) == []
    assert choice.logged[:4] == REGISTERED == ("hard", "nuanced", "weighted", "fbeta")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "hrad",
            "there is no reward 'hrad'; did you mean hard? (there are hard, nuanced, weighted",
        ),
        ("mixture", "there is no reward 'mixture'"),
        ("hard+0*fbeta", "fbeta has weight 0: leave it out"),
        ("hard+hard", "hard is named twice: add its weights up"),
        ("a:Mine+b:Mine", "Mine is named twice"),
        ("mine:hard", "mine:hard: hard is the name of a reward that there is; rename yours"),
        ("mine:mixture", "mixture is the name of a reward that there is"),
        ("-hard", "'- hard' is no reward; write NAME or WEIGHT*NAME, joined by + and -"),
        ("hard weighted", "'hard weighted' is no reward"),
        ("mine:", "'mine:' is no reward"),
        ("3:Mine", "'3:Mine' is no import path; write MODULE:NAME, as my_rewards:FBeta"),
        ("my_rewards.py:FBeta.x", "is no reward"),
    ],
)
def test_everything_else_is_refused(text, what):
    [problem] = reward_problems(text)
    assert problem.startswith(f"--reward {text}: ") and what in problem


def test_the_metrics_of_a_mixture_can_choose_the_best_checkpoint():
    config = GRPOConfig(
        reward="hard+mine:Brief",
        validation_file=("a=a.jsonl",),
        metric_for_best_model="a/rewards/mixture/mean + a/rewards/Brief/mean",
    )
    added = ("rewards/Brief/mean", "rewards/mixture/mean")
    assert set_metrics(config) == (*SET_METRICS, *added)
    assert judging_problems(config) == []
    [problem] = judging_problems(replace(config, reward="hard+fbeta"))[:1]
    assert "write NAME/METRIC" in problem


def test_the_warning_of_short_answers_comes_where_eq_3_is_trained_on():
    config = GRPOConfig(reward="hard+weighted")
    short = [sample(0, 0.0)] * 2
    assert "shorter than --min_length 250" in str(length_warning(config, short))
    assert length_warning(replace(config, reward="weighted"), short) is None


# ---- what is built -------------------------------------------------------------------------------
def test_all_registered_rewards_are_built_with_the_prevalence_of_the_data():
    # Edema in 1 of 4 images, Fracture in 3: weights 1/sqrt(p) are 2 and 1.155, so Edema alone is
    # 2 / 3.155 of both. At the start credit is mean(p) / p: 3 times as much for Edema.
    rewards = build_rewards(GRPOConfig(), examples("Edema", *["Fracture"] * 3))
    assert tuple(rewards) == REGISTERED
    weights = rewards["weighted"]._weights[None]
    assert weights["Edema"] / weights["Fracture"] == pytest.approx(3**0.5)
    edema, fracture = (rewards["fbeta"].worth(label)[0] for label in ("Edema", "Fracture"))
    assert edema / fracture == pytest.approx(3)


def test_a_mixture_is_built_last_and_scaled_as_a_whole(module):
    module("mine")
    config = GRPOConfig(reward="hard-0.5*mine:made", reward_scale=4.0)
    rewards = build_rewards(config, examples("Edema"))
    assert tuple(rewards) == (*REGISTERED, "made", "mixture")
    mixture = rewards["mixture"]
    assert isinstance(mixture, Mixture) and mixture.weights == {"hard": 1, "made": -0.5}
    assert (mixture.scale, rewards["hard"].scale, rewards["made"].scale) == (4, 1, 1)


# ---- rewards of one's own ------------------------------------------------------------------------
def test_a_class_gets_what_it_names(module):
    module("mine")
    made = own_reward("mine:Brief", {"label_frequency": {"Edema": 0.5}, "labels": LABELS})
    assert (made.label_frequency, made.words, made.labels) == ({"Edema": 0.5}, 9, LABELS)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("nowhere:Mine", "there is no module nowhere, neither on Python's path nor in the current"),
        ("mine.deeper:Mine", "there is no module mine.deeper, neither on Python's path nor in"),
        ("mine:Breif", "mine has no class or function Breif; did you mean Brief?"),
        ("mine:number", "mine has no class or function number"),
        ("mine:length", "length asks for answer, target, completion_length; what makes a reward"),
        ("mine:raising", "raising() raised KeyError: 'Edema' in mine.py, line 24"),
        ("mine:Reward", "Reward asks for total, parts"),
        ("torn:Mine", "importing torn raised SyntaxError: invalid syntax in torn.py, line 1"),
        (
            "lacking:Mine",
            "importing lacking raised ModuleNotFoundError: No module named 'nowhere' in",
        ),
        ("ending:Mine", "importing ending raised SystemExit: 0 in ending.py, line 1"),
        ("other:dict", "dict makes a dict, not a RewardFunction of rl.rewards; name a subclass"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_line(path, what, module):
    module("mine")
    for name, text in {
        "torn": "def (",
        "lacking": "import nowhere",
        "ending": "raise SystemExit(0)",
        "other": "dict = dict",
    }.items():
        module(name, text)
    with pytest.raises(UsageError) as refused:
        own_reward(path, {"label_frequency": {}, "labels": LABELS})
    [line] = refused.value.problems
    assert line.startswith(f"--reward {path}: ") and what in line and line.isprintable()


def test_the_path_of_python_stays_what_it_was(module):
    module("mine")
    before = list(sys.path)
    own_reward("mine:made", {})
    assert sys.path == before


def test_the_file_is_noted_and_a_change_is_told(module, capsys):
    file = module("mine")
    own_reward("mine:made", {})
    config = GRPOConfig(reward="hard+mine:made")
    noted = with_reward_code({"settings": 1}, config, None)
    sha256 = hashlib.sha256(MINE.encode()).hexdigest()
    code = {"mine": {"file": str(file), "sha256": sha256}}
    assert noted == {"settings": 1, "reward_code": code}
    with_reward_code({}, config, noted)
    assert capsys.readouterr().err == ""
    file.write_text(MINE + "\n", encoding="utf-8")
    again = with_reward_code({}, config, noted)["reward_code"]["mine"]["sha256"]
    assert again == hashlib.sha256(f"{MINE}\n".encode()).hexdigest() != sha256
    assert (
        f"mine.py is not what it was when the checkpoint was saved (SHA-256 {again[:12]}, was"
        in (capsys.readouterr().err)
    )
    assert with_reward_code({"a": 1}, GRPOConfig(), noted) == {"a": 1}


# ---- by whose word -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "origin", "refused"),
    [
        ("mine:Brief", "flag", False),
        ("mine:Brief", "recipe mine.toml", False),
        ("hard+mine:Brief", "resumed run", True),
        ("mine:Brief", "default", True),
        ("hard+fbeta", "resumed run", False),
    ],
)
def test_only_the_users_own_command_imports(text, origin, refused):
    resolved = Resolved((GRPOConfig(reward=text),), {"reward": origin}, ())
    problems = imports_that_nobody_gave(resolved)
    assert bool(problems) == refused
    if refused:
        assert problems[0].endswith(f"if it is yours, add --reward {text}")
