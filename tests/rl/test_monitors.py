"""Protect the monitors.

Checked: each by hand on a few completions; a scripted policy that collapses in each way is told of
by the default conditions, one that learns is left alone; and they survive a checkpoint.

Run: pytest tests/rl/test_monitors.py
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest
import torch

import rl.monitors
from data.answers import Answer
from data.examples import Example
from data.labels import CHEXPERT, LABELS, NO_FINDING, SUPPORT_DEVICES, Target
from engine.completion import Completion
from rl.monitors import WARN_WHEN, LabelWindow, Monitors, monitor_names
from rl.rewards import HardReward, NuancedReward, Reward, RewardFunction
from rl.samples import build_samples
from tests.helpers.repository import ROOT

CPU = torch.device("cpu")
NAMES = monitor_names(CHEXPERT)
CAP = 60  # max_completion_length


def example(name: str, *labels: str, evaluated: tuple[str, ...] = LABELS) -> Example:
    return Example(
        name, f"patient of {name}", "image.png", labels, "site", CPU, evaluated_labels=evaluated
    )


def text_of(labels, reasoning: str = "because") -> str:
    return f"<think>{reasoning}</think><solution>{', '.join(labels)}</solution>"


def samples_of(rows, rewards=None):
    """Make samples of rows.

    rows: (example, [(text, nats a token, number of tokens, truncated), ...]) for each prompt.
    """
    texts, groups = [], []
    for _, group in rows:
        groups.append(
            [
                Completion(
                    torch.tensor([len(texts) + i] + [0] * (length - 1)),
                    torch.full((length,), -nats),
                    torch.ones(length),
                    cut,
                )
                for i, (_, nats, length, cut) in enumerate(group)
            ]
        )
        texts += [text for text, *_ in group]
    return build_samples(
        [one for one, _ in rows],
        groups,
        lambda ids: texts[int(ids[0])],
        rewards or {"hard": HardReward(min_length=0), "nuanced": NuancedReward({})},
        "hard",
        answer_format="think_solution",
        mask_truncated_completions=False,
        text_length=lambda ids: len(ids) - texts[int(ids[0])].count("\n"),  # one token each
        length_of="completion",
    )


# ---- by hand -------------------------------------------------------------------------------------
@pytest.fixture
def window_of_four(monkeypatch):
    monkeypatch.setattr(rl.monitors, "WINDOW", 4)
    monkeypatch.setattr(rl.monitors, "SETTLED", 4)


def observed(*groups, monitors=None) -> dict[str, float]:
    values = (monitors or Monitors("hard", CAP)).observe(samples_of(groups))
    return {name.removeprefix("monitors/"): value for name, value in values.items()}


def test_what_is_said(window_of_four):
    # Images 1 (Edema) and 2 (Edema, Fracture), two answers each, none the same text.
    values = observed(
        (
            example("1", "Edema"),
            [
                (text_of(["Edema"], "a"), 1.0, 6, False),
                (text_of(["Edema", "edema"], "b"), 1.0, 6, False),
            ],
        ),
        (
            example("2", "Edema", "Fracture"),
            [
                (text_of(["No Finding", "Edema", "Cancer"], "c"), 1.0, 6, False),
                ("nothing", 1.0, 60, True),
            ],
        ),
    )
    assert (
        values["identical_text"] == 0
        and values["copied_reasoning"] == 0
        and values["distinct_per_group"] == 1
    )
    assert values["identical_labels"] == 2 / 4  # {Edema} twice; {No Finding, Edema}; unreadable
    assert (
        values["contradiction"] == 1 / 4
        and values["unknown_label"] == 1 / 4
        and values["duplicate_label"] == 1 / 4
    )
    # said - true, each of four: Edema 3 - 4, Fracture 0 - 2, No Finding 1 - 0
    assert (
        values["label_shift/Edema"] == -1 / 4
        and values["label_shift/Fracture"] == -2 / 4
        and values["label_shift/No_Finding"] == 1 / 4
    )
    assert values["label_shift"] == 2 / 4 and values["label_shift/Pneumonia"] == 0
    assert (
        values["truncated"] == 1 / 4
        and values["length_to_cap"] == (6 + 6 + 6 + 60) / 4 / CAP
        and values["entropy"] == 1
    )


def test_the_same_text(window_of_four):
    same, other = text_of(["Edema"], "so it is"), text_of(["Edema"], "another")
    # The text of image 1 also stands under image 2, twice in one group of it: three of four; image
    # 2's labels are the same as 1's, so its reasoning is no copy. Groups: 2 of 2 different, 1 of 2.
    values = observed(
        (example("1", "Edema"), [(same, 1, 5, False), (other, 1, 5, False)]),
        (example("2", "Edema"), [(same, 1, 5, False), (same, 1, 5, False)]),
    )
    assert (
        values["identical_text"] == 3 / 4
        and values["copied_reasoning"] == 0
        and values["distinct_per_group"] == (1 + 1 / 2) / 2
    )
    # With other labels it is one, whatever the answer after it.
    values = observed(
        (example("1", "Edema"), [(same, 1, 5, False), (other, 1, 5, False)]),
        (
            example("2", "Fracture"),
            [(text_of([], "so  it is"), 1, 5, False), (text_of(["Edema"], "third"), 1, 5, False)],
        ),
    )
    assert values["identical_text"] == 0 and values["copied_reasoning"] == 2 / 4


def test_groups_of_two_rollouts_are_two(window_of_four):
    monitors, group = (
        Monitors("hard", CAP),
        (
            example("1", "Edema"),
            [(text_of(["Edema"], "a"), 1, 5, False), (text_of(["Edema"], "b"), 1, 5, False)],
        ),
    )
    assert observed(group, monitors=monitors) == {}
    assert observed(group, monitors=monitors)["distinct_per_group"] == 1  # 2 of 2 twice, not 2 of 4


def test_labels_that_a_source_cannot_express_are_not_looked_at(window_of_four):
    nine = example("1", "Edema", evaluated=("No Finding", "Edema", "Pneumonia"))
    everything = (text_of(LABELS, "x"), 1, 5, False)
    two = (text_of(["Edema", "Pneumonia", "Fracture"], "y"), 1, 5, False)
    values = observed(
        (
            nine,
            [
                everything,
                two,
                (text_of(["Edema", "Fracture", "Cardiomegaly"]), 1, 5, False),
                (text_of(["Edema"]), 1, 5, False),
            ],
        )
    )
    # three and two of its three; Fracture and Cardiomegaly are not among them
    assert values["all_labels"] == 2 / 4
    assert set(name for name in values if "/" in name) == {
        "label_shift/No_Finding",
        "label_shift/Edema",
        "label_shift/Pneumonia",
    }


def test_reasoning(window_of_four):
    looping = " ".join(["the heart is large"] * 5)  # 20 words: 17 sequences, 4 of them different
    fine = " ".join(f"word{i}" for i in range(20))
    short = " ".join(["the heart is large"] * 4)  # 16 words are too few to tell
    values = observed(
        (
            example("1", "Edema"),
            [
                (text_of(["Edema"], reasoning), 1, 5, False)
                for reasoning in (looping, fine, short, "  \n")
            ],
        )
    )
    assert values["looping_reasoning"] == 1 / 4 and values["empty_reasoning"] == 1 / 4


def test_gains_are_in_standard_deviations_of_the_start(window_of_four):
    monitors = Monitors("hard", CAP)
    right, wrong = (
        (text_of(["Edema"], "r"), 2.0, 5, False),
        (text_of(["Fracture"], "w"), 2.0, 5, False),
    )
    half = (text_of(["Edema", "Fracture"], "h"), 0.5, 5, False)
    image = example("1", "Edema")
    values = observed((image, [right, wrong, right, wrong]), monitors=monitors)
    assert (
        values["trained_gain"]
        == values["f1_gain"]
        == values["hacking"]
        == values["entropy_drop"]
        == 0
    )
    # start: Jaccard and F1 1, 0, 1, 0: mean 1/2, SD sqrt(4 x 1/4 / 3) = 1/sqrt(3). Now Jaccard 1/2,
    # F1 2/3, nats 0.5 of 2.
    values = observed((image, [half] * 4), monitors=monitors)
    assert values["trained_gain"] == pytest.approx(0, abs=1e-12) and values[
        "f1_gain"
    ] == pytest.approx((2 / 3 - 1 / 2) * 3**0.5)
    assert values["hacking"] == pytest.approx(-(2 / 3 - 1 / 2) * 3**0.5) and values[
        "entropy_drop"
    ] == pytest.approx(3 / 4)
    # nuanced: 150 and a wrong label -10 at the start: mean 70, SD 160/sqrt(3); now 30 + 20/2 - 10 =
    # 30
    assert values["other_gain"] == pytest.approx((30 - 70) / (160 / 3**0.5))


def test_nothing_is_said_of_a_few_completions():
    monitors = Monitors("hard", CAP)
    group = (example("1", *LABELS), [(text_of(["Edema"]), 1, 5, False)] * 7)
    for _ in range(7):
        assert monitors.observe(samples_of([group])) == {}  # 49 of SETTLED = 50
    names = set(monitors.observe(samples_of([group])))
    assert (
        {f"monitors/{name}" for name in ("identical_text", "entropy", "label_shift/Edema")}
        <= names
        <= set(NAMES)
    )
    # the start is not complete yet
    assert not names & {"monitors/entropy_drop", "monitors/hacking"}
    for _ in range(21):
        names = set(monitors.observe(samples_of([group])))
    # after 203 completions, of 29 images
    of_images = {name for name in NAMES if "said_ratio" in name or "silenced" in name}
    assert names == set(NAMES) - of_images and len(of_images) == 15
    for _ in range(70):
        assert not names & of_images
        names = set(monitors.observe(samples_of([group])))
    assert names == set(NAMES) - of_images  # 99 images
    assert set(monitors.observe(samples_of([group]))) == set(NAMES)


# ---- labels that fall silent ---------------------------------------------------------------------
def seen(monitors: Monitors, *images: tuple[Example, list[list[str]]]) -> dict[str, float]:
    """Let the monitors see images with the labels that each completion says."""
    rows = [
        (image, [(text_of(labels, f"{i}"), 1.0, 5, False) for i, labels in enumerate(said)])
        for image, said in images
    ]
    values = monitors.observe(samples_of(rows))
    return {name.removeprefix("monitors/"): value for name, value in values.items()}


def test_silenced_labels_count_images_and_not_completions(monkeypatch):
    monkeypatch.setattr(rl.monitors, "IMAGES_SETTLED", 14)
    monitors = Monitors("hard", CAP, WARN_WHEN)
    # 40 completions of 10 images with Edema and Fracture. Edema is said for 3 of the images, by all
    # four: 3 of 10. Fracture by two of four for 4 of them, and once by mistake: 2 + 1/4.
    rows = [
        (
            example(f"e{i}", "Edema", "Fracture"),
            [["Edema"] * (i < 3) + ["Fracture"] * (i > 5 and j < 2) for j in range(4)],
        )
        for i in range(10)
    ]
    rows += [(example(f"n{i}", NO_FINDING), [[NO_FINDING]] * 4) for i in range(3)]
    assert "silenced_labels" not in seen(monitors, *rows)  # 13 images of 14
    values = seen(monitors, (example("n3", NO_FINDING), [["Fracture"], *[[NO_FINDING]] * 3]))
    # Fracture 2.25 < 10 / 4. No Finding 3 + 3/4 of 4
    assert values["silenced_labels"] == 1
    assert values["said_ratio/Fracture"] == (2.25 + 1) / (10 + 1)
    assert values["said_ratio/Edema"] == (3 + 1) / (10 + 1)
    assert values["said_ratio/No_Finding"] == (3.75 + 1) / (4 + 1)
    assert "said_ratio/Pneumonia" not in values  # nowhere true and never said
    named = {f"monitors/{name}": value for name, value in values.items()}
    assert "warning: monitors/silenced_labels>0: 1 (Fracture)" in monitors.check(named)


def test_labels_that_are_not_evaluated_are_neither_said_nor_true(monkeypatch):
    monkeypatch.setattr(rl.monitors, "IMAGES_SETTLED", 12)
    monitors = Monitors("hard", CAP)
    values = seen(
        monitors,
        *[
            (
                example(f"e{i}", "Edema", "Fracture", evaluated=("Edema", "Pneumonia")),
                [["Edema", "Cardiomegaly"]] * 5,
            )
            for i in range(12)
        ],
    )
    assert values["silenced_labels"] == 0 and values["said_ratio/Edema"] == 1
    ratios = [name for name in values if name.startswith("said_ratio/")]
    assert ratios == ["said_ratio/Edema"]


def test_the_window_of_images_forgets(monkeypatch):
    monkeypatch.setattr(rl.monitors, "IMAGES", 12)
    monkeypatch.setattr(rl.monitors, "IMAGES_SETTLED", 12)
    monitors = Monitors("hard", CAP)
    silent = [(example(f"s{i}", "Edema"), [[NO_FINDING]] * 5) for i in range(12)]
    assert seen(monitors, *silent)["silenced_labels"] == 1
    spoken = [(example(f"t{i}", "Edema"), [["Edema"]] * 5) for i in range(2)]
    assert seen(monitors, *spoken)["silenced_labels"] == 1  # 2 of 12 are less than a quarter
    assert seen(monitors, *spoken[:1])["silenced_labels"] == 0  # 3 of 12 are not


def silent_after(monitors: Monitors, dead: list[str], name: str) -> list[str]:
    """Let the monitors see 12 images without the dead labels -> the warnings."""
    rows = [
        (
            example(f"{name}{i}", "Edema", "Fracture", "Pneumonia"),
            [[label for label in ("Edema", "Fracture", "Pneumonia") if label not in dead]] * 5,
        )
        for i in range(12)
    ]
    values = seen(monitors, *rows)
    metrics = {f"monitors/{name}": value for name, value in values.items()}
    return [line for line in monitors.check(metrics) if "silenced" in line]


@pytest.mark.parametrize("resumed", [False, True])
def test_each_label_that_falls_silent_is_named_once(monkeypatch, resumed):
    monkeypatch.setattr(rl.monitors, "IMAGES", 12)
    monkeypatch.setattr(rl.monitors, "IMAGES_SETTLED", 12)
    monitors = Monitors("hard", CAP, WARN_WHEN)
    lines = []
    for name, dead in (
        ("a", []),
        ("b", ["Fracture"]),
        ("c", ["Fracture"]),  # still silent
        ("d", ["Fracture", "Edema"]),
        ("e", ["Edema"]),  # one speaks again
        ("f", []),
        ("g", ["Edema"]),  # silent a second time
    ):
        lines.append(silent_after(monitors, dead, name))
        if resumed:
            again = Monitors("hard", CAP, WARN_WHEN)
            again.load_state_dict(json.loads(json.dumps(monitors.state_dict())))
            monitors = again
    warning = "warning: monitors/silenced_labels>0"
    assert lines == [
        [],
        [f"{warning}: 1 (Fracture)"],
        [],
        [f"{warning}: 2 (Edema, Fracture)"],
        [],
        [],
        [],  # Edema was named at "d"
    ]


@pytest.mark.parametrize("resumed", [False, True])
def test_labels_of_rollouts_between_two_logs_are_all_named(monkeypatch, resumed):
    """With --logging_steps 2 two rollouts are logged as their mean, and one line names both."""
    monkeypatch.setattr(rl.monitors, "IMAGES", 12)
    monkeypatch.setattr(rl.monitors, "IMAGES_SETTLED", 12)
    monitors = Monitors("hard", CAP, WARN_WHEN)
    for name, dead in (("a", "Fracture"), ("b", "Edema")):
        rows = [
            (
                example(f"{name}{i}", "Edema", "Fracture"),
                [[label for label in ("Edema", "Fracture") if label != dead]] * 5,
            )
            for i in range(12)
        ]
        assert seen(monitors, *rows)["silenced_labels"] == 1
        assert monitors.check({"gap": 0.1}) == []  # an evaluation between them has no say
        if resumed:
            again = Monitors("hard", CAP, WARN_WHEN)
            again.load_state_dict(json.loads(json.dumps(monitors.state_dict())))
            monitors = again
    lines = monitors.check({"monitors/silenced_labels": 1.0})
    assert lines == ["warning: monitors/silenced_labels>0: 1 (Edema, Fracture)"]


def test_the_demos_own_run_is_told_of_the_labels_that_it_silences():
    """Replay the first 126 steps of a run of the demo's GRPO, of which nothing else was told.

    The file has one character for each image: how many of its four answers say the label, as a
    digit, or as a letter from a = 0 where the label is true.
    """
    told = json.loads((ROOT / "tests/helpers/silenced_demo.json").read_text())
    monitors, lines = Monitors("hard", CAP, WARN_WHEN), {}
    for start in range(0, 1008, 16):  # a rollout has 16 images and two steps
        rows = []
        for i in range(start, start + 16):
            marks = {label: marks[i] for label, marks in told.items()}
            counts = {
                label: "abcde".index(mark) if mark.isalpha() else int(mark)
                for label, mark in marks.items()
            }
            rows.append(
                (
                    example(f"{i}", *[label for label, mark in marks.items() if mark.isalpha()]),
                    [[label for label, n in counts.items() if j < n] for j in range(4)],
                )
            )
        values = seen(monitors, *rows)
        metrics = {f"monitors/{name}": value for name, value in values.items()}
        for line in monitors.check(metrics):
            if "silenced" in line or "label_shift" in line:
                lines[start // 8 + 1] = line
    assert lines == {
        87: "warning: monitors/silenced_labels>0: 1 (Pleural Other)",
        121: "warning: monitors/silenced_labels>0: 2 (Pleural Other, Fracture)",
    }


@pytest.mark.parametrize("alike", [False, True])
def test_a_policy_that_says_labels_at_their_prevalence_is_left_alone(alike):
    """20 runs of 1000 images. tests/benchmarks/false_alarms.py counts 200 of several kinds."""
    shares = (0.31, 0.11, 0.18, 0.12, 0.12, 0.13, 0.12, 0.09, 0.12, 0.11, 0.17, 0.08, 0.09, 0.26)
    rng, told = random.Random(0), 0

    def drawn() -> tuple[str, ...]:
        return tuple(x for x, share in zip(LABELS, shares, strict=True) if rng.random() < share)

    for _ in range(20):
        window, silenced = LabelWindow(), set()
        for image in range(1000):
            first = drawn()
            said = [first if alike else drawn() for _ in range(4)]
            answers = [Answer(valid=True, parsed=True, labels=labels) for labels in said]
            window.add(Target(frozenset(drawn())), answers)
            if image % 16 == 15:
                silenced.update(window.silenced())
        told += bool(silenced)
    assert told <= (1 if alike else 0)


def test_padding_is_the_mean_share_of_tokens_that_are_not_text(window_of_four):
    samples = samples_of([(example("1", "Edema"), [(text_of(["Edema"], "a"), 1, 8, False)] * 4)])
    for one, text in zip(samples, (8, 8, 4, 2), strict=True):
        one.text_length = text
    values = Monitors("hard", CAP).observe(samples)
    assert values["monitors/padding"] == (0 + 0 + 1 / 2 + 3 / 4) / 4


def test_the_docstring_lists_the_monitors():
    listed = re.findall(r"^    ([a-z0-9_]+(?:/<label>)?) {2,}\S", rl.monitors.__doc__, re.MULTILINE)
    assert len(listed) == len(set(listed))
    # label_shift has a row of its own, which names label_shift/<label> too
    names = {re.sub("/[A-Z].*", "/<label>", name.removeprefix("monitors/")) for name in NAMES}
    assert set(listed) == names - {"label_shift/<label>"}


# ---- scripted policies ---------------------------------------------------------------------------
TRUTHS = (
    [NO_FINDING],
    ["Edema"],
    ["Cardiomegaly", "Edema"],
    ["Pneumonia"],
    ["Pleural Effusion", SUPPORT_DEVICES],
    ["Fracture"],
    [NO_FINDING],
    ["Atelectasis", "Lung Opacity"],
)
WORDS = [
    "the",
    "a",
    "heart",
    "lung",
    "left",
    "right",
    "base",
    "apex",
    "hazy",
    "clear",
    "dense",
    "sharp",
    "border",
    "vessel",
    "rib",
    "device",
    "silhouette",
    "volume",
    "shadow",
    "line",
    "angle",
]
# rollout from which a policy collapses: the start (200 completions) is complete after the seventh
SWITCH = 8


def healthy(image: Example, rng: random.Random, number: int) -> tuple[str, float, int, bool]:
    """Answer as a policy that learns.

    Labels are right more often as training goes on, entropy falls a little, and each completion has
    reasoning of its own.
    """
    errors = 0.3 - 0.005 * number
    said = [label for label in image.labels if rng.random() > errors] + [rng.choice(LABELS[1:])] * (
        rng.random() < errors
    )
    said = list(dict.fromkeys(said)) or [NO_FINDING]
    if NO_FINDING in said and rng.random() > 0.1:  # contradicts itself now and then
        said = [NO_FINDING]
    words = " ".join(rng.choices(WORDS, k=rng.randint(10, 30)))
    return (
        text_of(said, words),
        rng.gauss(0.6, 0.1) * (1 - 0.01 * number),
        rng.randint(20, 50),
        rng.random() < 0.02,
    )


def with_labels(choose, keep: float = 0.0):
    def policy(image, rng, number):
        text, *rest = healthy(image, rng, number)
        return (
            (text, *rest)
            if rng.random() < keep
            else (text_of(choose(image, rng), text[len("<think>") : text.index("</think>")]), *rest)
        )

    return policy


def with_reasoning(choose):
    def policy(image, rng, number):
        text, *rest = healthy(image, rng, number)
        return (
            text_of(
                [text[text.index("<solution>") + 10 : text.index("</solution>")]],
                choose(image, rng),
            ),
            *rest,
        )

    return policy


def one_a_group(image, rng, number):
    return healthy(image, random.Random(image.id), number)


def sharp(image, rng, number):
    text, nats, *rest = healthy(image, rng, number)
    return (text, 0.2 * nats, *rest)


def padded(image, rng, number):
    text, nats, length, cut = healthy(image, rng, number)
    return text + "\n" * length, nats, 2 * length, cut


def to_the_cap(image, rng, number):
    text, nats, _, _ = healthy(image, rng, number)
    cut = rng.random() < 0.5
    return text[:60] if cut else text, nats, CAP, cut


# Each way to collapse, and exactly the conditions that tell of it.
COLLAPSES = {
    "one answer to everything": (
        lambda *_: (text_of(["Edema"], "haze in both lungs"), 0.5, 20, False),
        {
            "identical_text",
            "identical_labels",
            "label_shift",
            "copied_reasoning",
            "distinct_per_group",
            "silenced_labels",  # all but Edema
        },
    ),
    "one label set": (
        with_labels(lambda *_: ["Lung Opacity"]),
        {"identical_labels", "label_shift", "silenced_labels"},
    ),
    "all labels": (
        with_labels(lambda *_: LABELS),
        {"all_labels", "identical_labels", "label_shift", "contradiction"},
    ),
    "many labels": (
        with_labels(lambda _, rng: rng.sample(LABELS[1:], 9)),
        {"all_labels", "label_shift"},
    ),
    "a label to go with each": (
        with_labels(lambda image, _: {*image.labels, SUPPORT_DEVICES}),
        {"label_shift"},
    ),
    "No Finding with findings": (
        with_labels(lambda image, _: {NO_FINDING, *image.labels, "Edema"}, keep=0.6),
        {"contradiction"},
    ),
    "labels of its own": (
        with_labels(lambda image, _: [*image.labels, "Silicosis"]),
        {"unknown_label"},
    ),
    "labels twice": (
        with_labels(lambda image, _: [*image.labels, *image.labels]),
        {"duplicate_label"},
    ),
    "no reasoning": (with_reasoning(lambda *_: ""), {"empty_reasoning", "identical_text"}),
    "reasoning that loops": (
        with_reasoning(lambda _, rng: " ".join(rng.choices(WORDS, k=5) * 6)),
        {"looping_reasoning"},
    ),
    "reasoning by rote": (
        with_reasoning(lambda *_: "I looked at the lungs, the heart and the bones."),
        {"copied_reasoning", "identical_text"},
    ),
    "one completion a group": (one_a_group, {"distinct_per_group"}),
    "no entropy": (sharp, {"entropy_drop"}),
    "white space after the answer": (padded, {"padding"}),
    "longer and longer": (to_the_cap, {"truncated"}),
}


def told_of(policy, rewards=None, rollouts: int = 24, seed: int = 0) -> set[str]:
    """Name the monitors whose default conditions came true.

    A rollout has 8 prompts x 4 completions, from `policy` after SWITCH.
    """
    rng, monitors, lines = random.Random(seed), Monitors("hard", CAP, WARN_WHEN), []
    for number in range(rollouts):
        images = [example(f"{number}-{i}", *rng.choice(TRUTHS)) for i in range(8)]
        rule = healthy if number < SWITCH else policy
        lines += monitors.check(
            monitors.observe(
                samples_of(
                    [(image, [rule(image, rng, number) for _ in range(4)]) for image in images],
                    rewards,
                )
            )
        )
        assert number >= SWITCH or not lines
    return {line.removeprefix("warning: monitors/").split("<")[0].split(">")[0] for line in lines}


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_that_learns_is_left_alone(seed):
    assert told_of(healthy, rollouts=40, seed=seed) == set()


def test_a_label_that_dies_is_told_of_although_it_is_in_one_image_of_seven():
    without = with_labels(lambda image, _: [x for x in image.labels if x != "Fracture"])
    assert told_of(without, rollouts=60) == {"silenced_labels"}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_told_of(name):
    policy, expected = COLLAPSES[name]
    assert told_of(policy) == expected


class Wordy(RewardFunction):
    """Pay for words: a reward that can be gamed."""

    def __call__(self, answer, target, completion_length):
        return Reward(float(completion_length), {"length": float(completion_length)})


def test_a_reward_that_is_gamed_is_told_of():
    def gaming(image, rng, number):
        text, nats, _, _ = healthy(image, rng, 0)
        return text, nats, 58, False

    rewards = {"hard": Wordy(), "nuanced": NuancedReward({})}
    assert told_of(gaming, rewards) == {"hacking"}
    assert told_of(healthy, rewards) == set()


def test_every_default_condition_is_shown_to_tell():
    shown = set().union({"hacking"}, *(expected for _, expected in COLLAPSES.values()))
    assert {
        condition.removeprefix("monitors/").split("<")[0].split(">")[0] for condition in WARN_WHEN
    } == shown


# ---- stop, resume --------------------------------------------------------------------------------
def test_a_stop_is_remembered_until_its_condition_is_dropped():
    monitors = Monitors("hard", CAP, stop_when=["gap>0.1"])
    assert monitors.check({"gap": 0.05}) == [] and monitors.stopped is None
    assert (
        monitors.check({"gap": 0.25}) == ["stopping: gap>0.1: 0.25"]
        and monitors.stopped == "gap>0.1: 0.25"
    )
    for conditions, stopped in ((["gap>0.1"], "gap>0.1: 0.25"), (["gap>0.3"], None), ([], None)):
        resumed = Monitors("hard", CAP, stop_when=conditions)
        resumed.load_state_dict(json.loads(json.dumps(monitors.state_dict())))
        assert resumed.stopped == stopped


@pytest.mark.parametrize("stop", [5, 9])  # before and after the start is complete
def test_a_resumed_run_monitors_as_the_whole_one(stop):
    rng = random.Random(1)
    rollouts = [
        [
            (image, [healthy(image, rng, number) for _ in range(4)])
            for image in [example(f"{number}-{i}", *rng.choice(TRUTHS)) for i in range(8)]
        ]
        for number in range(12)
    ]
    whole, first = Monitors("hard", CAP), Monitors("hard", CAP)
    expected = [whole.observe(samples_of(rollout)) for rollout in rollouts]
    for rollout in rollouts[:stop]:
        first.observe(samples_of(rollout))
    resumed = Monitors("hard", CAP)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [resumed.observe(samples_of(rollout)) for rollout in rollouts[stop:]] == expected[stop:]
    assert "monitors/hacking" in expected[-1]


def test_what_flags_are_checked_against_loads_without_torch():
    """`run_grpo.py --help` and a typo in a condition are answered before torch is imported."""
    source = (
        "import sys, rl.conditions, rl.monitors, rl.rewards\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    python = [sys.executable, "-c", source]
    found = subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
