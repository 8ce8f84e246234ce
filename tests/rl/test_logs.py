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
from rl.logs import grpo_charts, largest_spread, show_samples
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
