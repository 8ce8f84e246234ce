"""Protect what a person sees of a GRPO run in TensorBoard.

Checked: which group is shown and why, how its completions are written, and the page of charts.

Run: pytest tests/rl/test_logs.py
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import rl.logs
from data.files import DataError
from data.labels import Target
from engine.tracking import MetricAccumulator
from rl.logs import grpo_charts, hospital_metrics, largest_spread, show_samples
from rl.rewards import Reward


def sample(group: int, reward: float, text: str = "x", **more) -> SimpleNamespace:
    fields = {
        "group": group,
        "reward": reward,
        "text": text,
        "ids": [1, 2, 3],
        "truncated": False,
        "advantage": reward - 0.5,
        "rewards": {"hard": Reward(reward, {}), "nuanced": Reward(12.0, {})},
        "example": SimpleNamespace(id=f"image_{group}", target=Target({"Edema"}, {"Edema"})),
    }
    return SimpleNamespace(**fields | more)


def rollout(*groups: tuple[float, ...]) -> list[SimpleNamespace]:
    return [sample(n, reward) for n, rewards in enumerate(groups) for reward in rewards]


@pytest.mark.parametrize(
    "groups, chosen, why",
    [
        # spreads 0.2, 0.9, 0: the second
        (
            ((0.5, 0.7), (0.0, 0.9), (1.0, 1.0)),
            1,
            "of 3 groups the one with the largest spread of rewards, 0.9",
        ),
        # spreads 0, 0.5, 0.5, however the rounding falls: 0.8 - 0.3 is 0.5 and 0.1 + 0.5 is 0.6
        (
            ((0.5, 0.5), (0.3, 0.8), (0.6, 0.1)),
            1,
            "the first of 2 groups (of 3) with the largest spread of rewards, 0.5",
        ),
        (((0.5, 0.5), (1.0, 1.0)), 0, "the first of 2 groups, in none of which rewards differ"),
        (((0.2, 0.3),), 0, "of 1 groups the one with the largest spread of rewards, 0.1"),
    ],
)
def test_the_group_with_the_largest_spread_of_rewards_is_shown(groups, chosen, why):
    samples = rollout(*groups)
    shown, said = largest_spread(samples)
    assert [s.group for s in shown] == [chosen] * 2 and said == why
    # groups are told by their number, not by their place
    mixed = samples[::2] + samples[1::2]
    assert {s.group for s in largest_spread(mixed)[0]} == {chosen}


class Log:
    def __init__(self):
        self.images, self.texts = [], []

    def image(self, tag, array, step):
        self.images.append((tag, array.shape, step))

    def text(self, tag, markdown, step):
        self.texts.append((tag, markdown, step))


def test_a_group_is_shown_as_a_list_without_markup_of_the_model(monkeypatch):
    monkeypatch.setattr(
        rl.logs, "load_image", lambda _: Image.fromarray(np.zeros((900, 600), dtype=np.uint8))
    )
    log = Log()
    samples = [
        sample(0, 0.5, "no difference"),
        sample(0, 0.5, "no difference"),
        sample(1, 0.25, "- a <b>|*list*\nnext", truncated=True),
        sample(1, 1.0, "Edema"),
    ]
    show_samples(log, samples, 7)
    assert log.images == [("completions/image", (448, 299), 7)]
    [(tag, text, step)] = log.texts
    assert (tag, step) == ("completions/text", 7)
    assert text.splitlines() == [
        "**image&#95;1**, true labels: **Edema**",
        "",
        "Shown is of 2 groups the one with the largest spread of rewards, 0.75.",
        "",
        "1. **hard 0.25 &middot; nuanced 12.00 &middot; advantage -0.25 &middot; 3 tokens &middot;"
        " truncated**",
        "",
        "    &ldquo;- a &lt;b&gt;&#124;&#42;list&#42;<br>next&rdquo;",
        "",
        "2. **hard 1.00 &middot; nuanced 12.00 &middot; advantage +0.50 &middot; 3 tokens**",
        "",
        "    &ldquo;Edema&rdquo;",
    ]


def test_an_image_that_is_gone_ends_no_step_that_is_made(monkeypatch):
    def gone(example):
        raise DataError([f"example {example.id!r}: no such file"])

    monkeypatch.setattr(rl.logs, "load_image", gone)
    log = Log()
    show_samples(log, [sample(0, 0.5, "Edema"), sample(0, 1.0, "Edema")], 7)
    assert log.images == [] and len(log.texts) == 1


def test_a_page_of_six_charts():
    charts = grpo_charts(["site-a", "site-b"])
    assert [chart.tag for chart in charts] == [
        "reward",
        "macro_f1",
        "gap_shared",
        "kl_and_entropy",
        "valid_and_truncated",
        "length",
    ]
    assert charts[1].curves == {"site-a": "eval/site-a/macro_f1", "site-b": "eval/site-b/macro_f1"}
    assert charts[1].ends == charts[4].ends == (-0.03, 1.03)
    # one set has no gap, none has no macro-F1 either
    assert [chart.tag for chart in grpo_charts(["a"])][1:3] == ["macro_f1", "kl_and_entropy"]
    assert [chart.tag for chart in grpo_charts([])][:2] == ["reward", "kl_and_entropy"]


# ---- several hospitals ---------------------------------------------------------------------------
def of(hospital: str, group: int, *rewards: float) -> list[SimpleNamespace]:
    example = SimpleNamespace(id="1", hospital=hospital)
    return [sample(group, reward, example=example) for reward in rewards]


def test_what_each_hospital_earns():
    """Sample standard deviations of two: |difference| / sqrt(2)."""
    samples = [*of("a", 0, 1.0, 0.0), *of("b", 1, 0.5, 0.5), *of("a", 2, 0.2, 0.4)]
    found = hospital_metrics(samples, ["a", "b", "c"])
    values = {
        name: (round(float(metric.value), 6), metric.weight) for name, metric in found.items()
    }
    assert values == {
        "reward/a": (0.4, 2),
        "reward_group_std/a": (0.424264, 2),  # (0.707107 + 0.141421) / 2
        "frac_reward_zero_std/a": (0.0, 2),
        "share_of_prompts/a": (0.666667, 3),
        "reward/b": (0.5, 1),
        "reward_group_std/b": (0.0, 1),
        "frac_reward_zero_std/b": (1.0, 1),
        "share_of_prompts/b": (0.333333, 3),
        "share_of_prompts/c": (0.0, 3),
    }
    assert hospital_metrics(samples, ["a"]) == {} == hospital_metrics(samples, [None])


def test_two_rollouts_of_a_step_combine_to_the_mean_over_prompts():
    """b: 0.5 of one prompt, then 1.0 of each of two: 2.5 / 3. a: of the first rollout alone."""
    logged = MetricAccumulator()
    logged.add_all(hospital_metrics([*of("a", 0, 1.0, 0.0), *of("b", 1, 0.5, 0.5)], ["a", "b"]))
    second = [*of("b", 0, 1.0, 1.0), *of("b", 1, 1.0, 1.0)]
    logged.add_all(hospital_metrics(second, ["a", "b"]))
    found = logged.collect()
    assert found["reward/b"] == pytest.approx(2.5 / 3) and found["reward/a"] == 0.5
    assert found["frac_reward_zero_std/b"] == 1.0 and found["frac_reward_zero_std/a"] == 0.0
    # shares 1/2 and 0 of two prompts each; of b 1/2 and 1
    assert (found["share_of_prompts/a"], found["share_of_prompts/b"]) == (0.25, 0.75)


def test_the_chart_of_rewards_shows_each_hospital():
    chart = next(chart for chart in grpo_charts(["a"], ["a", "b"]) if chart.tag == "reward")
    assert chart.curves == {
        "": "train/reward",
        "a, sampled": "train/reward/a",
        "b, sampled": "train/reward/b",
        "a": "eval/a/reward",
    }
    for hospitals in ((), ["a"], [None]):
        chart = next(chart for chart in grpo_charts(["a"], hospitals) if chart.tag == "reward")
        assert list(chart.curves) == ["", "a"]
