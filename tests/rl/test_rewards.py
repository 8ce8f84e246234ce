"""Protect Eq. 3 and Eq. 4.

Checked: every part of both rewards against points added up by hand.

A reward that is off by a sign or a label trains towards the wrong thing, and the curve still rises.
"""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from data.answers import parse_answer
from data.labels import NIH_NINE, Target, canonical_label
from rl.rewards import HardReward, NuancedReward, Reward, RewardFunction, jaccard, rewards_record

FREQUENCY = {"Support Devices": 0.5, "No Finding": 0.25, "Edema": 0.1}


def answer(*entries: str):
    return parse_answer(f"<think>x</think><solution>{', '.join(entries)}</solution>")


def target(*labels: str, evaluated=None) -> Target:
    return (
        Target(frozenset(labels))
        if evaluated is None
        else Target(frozenset(labels), frozenset(evaluated))
    )


# Jaccard


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        (["Edema", "Cardiomegaly"], ["edema", "Pleural Effusion"], 1 / 3),  # 1 shared of 3
        ([], [], 1.0),  # convention
        (["No Finding"], ["Pneumonia"], 0.0),
        # a repetition is one label
        (["Edema", " edema ", "Atelectasis"], ["Atelectasis", "Edema"], 1.0),
        ([], ["Fracture"], 0.0),
    ],
)
def test_jaccard_of_canonical_labels(predicted, true, expected):
    assert jaccard(
        [canonical_label(p) for p in predicted], [canonical_label(t) for t in true]
    ) == pytest.approx(expected)


# Eq. 3


@pytest.mark.parametrize(
    ("completion_length", "expected"),
    [(0, -0.1), (249, -0.1), (250, 0.0), (1000, 0.0)],  # strictly below 250 is short
)
def test_hard_reward_charges_short_answers(completion_length, expected):
    # Predicted {Edema, Fracture}, true {Edema}: 1 shared of 2.
    reward = HardReward()(answer("Edema", "Fracture"), target("Edema"), completion_length)
    assert reward == Reward(0.5 + expected, {"jaccard": 0.5, "length": expected})


def test_hard_reward_of_an_invalid_answer_is_zero_at_any_length():
    for text in (
        "",
        "<solution>Edema</solution>",
        "<think>x</think><solution>Edema</solution> Done.",
    ):
        for completion_length in (10, 300):
            reward = HardReward()(parse_answer(text), target("Edema"), completion_length)
            assert reward == Reward(0.0, {"jaccard": 0.0, "length": 0.0})


def test_hard_reward_ranks_a_short_wrong_answer_below_an_invalid_one():
    # Eq. 3 to the letter: J = 0 less lambda = 0.1, against 0.
    assert HardReward()(answer("Fracture"), target("Edema"), 100).total == -0.1


def test_hard_reward_counts_unknown_labels_in_the_union():
    # {Edema, nodule, hernia} against {Edema}: 1 of 3. The repeated nodule is still one label.
    reward = HardReward()(answer("Edema", "nodule", "hernia", "Nodule"), target("Edema"), 300)
    assert reward.total == pytest.approx(1 / 3)


def test_hard_reward_of_no_label_where_none_is_true_is_one():
    assert HardReward()(answer(), target(), 300).total == 1.0
    assert HardReward()(answer(), target("Edema"), 300).total == 0.0


def test_hard_reward_ignores_labels_that_the_source_cannot_express():
    # NIH knows neither Support Devices nor Lung Opacity: {Edema} against {Edema}.
    evaluated = target("Edema", "Support Devices", evaluated=NIH_NINE)
    assert HardReward()(answer("Edema", "Lung Opacity"), evaluated, 300).total == 1.0
    # Only unknown positions left on both sides: empty against empty.
    assert HardReward()(answer("Lung Opacity"), target(evaluated=NIH_NINE), 300).total == 1.0


def test_hard_reward_takes_its_numbers_from_its_fields():
    reward = HardReward(length_penalty=0.25, min_length=20)
    assert reward(answer("Edema"), target("Edema"), 19).total == 0.75
    assert reward(answer("Edema"), target("Edema"), 20).total == 1.0
    assert reward.scaled(Reward(-0.25, {})) == -0.25


# Eq. 4


def points(reward: Reward) -> tuple[float, ...]:
    return tuple(
        reward.parts[name] for name in ("match", "partial", "false_positive", "collapse", "format")
    )


def test_nuanced_reward_of_an_exact_answer_is_150():
    # 100 for the match, 30 x 2/2 and 20 x 2/2.
    reward = NuancedReward(FREQUENCY)(answer("Edema", "Fracture"), target("Fracture", "Edema"), 10)
    assert points(reward) == (100, 50, 0, 0, 0)
    assert reward.total == 150


def test_nuanced_reward_of_a_partly_right_answer():
    # Predicted {Edema, Fracture, Support Devices, No Finding}, true {Edema, Pneumonia}; one hit.
    # partial: 30 x 1/2 + 20 x 1/4 = 20
    # false positives: Fracture, which has no frequency, 10; Support Devices 10 + 40 x 0.5 = 30; No
    # Finding 10 + 40 x 0.25 = 20
    reward = NuancedReward(FREQUENCY)(
        answer("Edema", "Fracture", "Support Devices", "No Finding"),
        target("Edema", "Pneumonia"),
        10,
    )
    assert points(reward) == pytest.approx((0, 20, -60, 0, 0))
    assert reward.total == pytest.approx(-40)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        # nothing to find and nothing claimed: a match, recall and precision 1
        ((), (), (100, 50, 0, 0, 0)),
        ((), ("Edema",), (0, 0, 0, 0, 0)),  # recall 0/1, precision 0/0 = 0
        (("Edema",), (), (0, 0, -14, 0, 0)),  # recall 0/0 = 0, precision 0/1; 10 + 40 x 0.1
        (("Edema",), ("Edema", "Fracture", "Pneumonia"), (0, 30, 0, 0, 0)),  # 30 x 1/3 + 20 x 1/1
    ],
)
def test_nuanced_reward_with_empty_sides(predicted, true, expected):
    assert points(NuancedReward(FREQUENCY)(answer(*predicted), target(*true), 10)) == pytest.approx(
        expected
    )


def test_nuanced_reward_charges_common_labels_more_than_rare_ones():
    # The same miss, by the label's share of the training data: 0.5 > 0.25 > 0.1 > absent.
    reward = NuancedReward(FREQUENCY)
    charged = [
        reward(answer(label), target("Pneumonia"), 10).total
        for label in ("Support Devices", "No Finding", "Edema", "Fracture")
    ]
    assert charged == pytest.approx([-30, -20, -14, -10])


def test_nuanced_reward_drops_unknown_and_repeated_labels_after_charging_them():
    # Known: {Edema} = true, so match and both partials in full. Format: 2 unknown (nodule, hernia)
    # x 100, and 3 repeats (edema twice, Nodule) x 25.
    reward = NuancedReward(FREQUENCY)(
        answer("Edema", "nodule", "hernia", "edema", "edema", "Nodule"), target("Edema"), 10
    )
    assert points(reward) == (100, 50, 0, 0, -275)
    assert reward.total == -125


@pytest.mark.parametrize(
    "text",
    [
        "Sure. <think>x</think><solution>Edema</solution>",
        "<think>x</think><solution>Edema</solution> Done.",
        "<solution>Edema</solution>",  # no reasoning
    ],
)
def test_nuanced_reward_charges_a_readable_answer_that_breaks_the_form(text):
    # An exact answer (150) less 25, once.
    assert points(NuancedReward(FREQUENCY)(parse_answer(text), target("Edema"), 10)) == (
        100,
        50,
        0,
        0,
        -25,
    )


def test_nuanced_reward_of_an_unreadable_answer_is_its_penalty_alone():
    for true in (target("Edema"), target()):  # not a match of "no label" either
        reward = NuancedReward(FREQUENCY)(parse_answer("<think>x</think><solution>Edema"), true, 10)
        assert points(reward) == (0, 0, 0, 0, -200)


def test_nuanced_reward_ignores_labels_that_the_source_cannot_express():
    # Under NIH's nine both sides are {Edema}; Support Devices costs nothing, and a missed Lung
    # Opacity is not missed.
    evaluated = target("Edema", "Lung Opacity", evaluated=NIH_NINE)
    assert points(NuancedReward(FREQUENCY)(answer("Edema", "Support Devices"), evaluated, 10)) == (
        100,
        50,
        0,
        0,
        0,
    )


def test_false_positives_cost_as_much_as_the_label_is_frequent_at_the_images_hospital():
    # Wrong Support Devices at a share of 0.5 costs 10 + 40 x 0.5 = 30, at 0.05 12, at none 10. A
    # target of another hospital, or of none, has the share of all rows: 0.3, so 22.
    reward = NuancedReward(
        {"Support Devices": 0.3}, by_hospital={"a": {"Support Devices": 0.5}, "b": {}}
    )
    said, expected = answer("Edema", "Support Devices"), {"a": -30, "b": -10, "c": -22, None: -22}
    for hospital, points_lost in expected.items():
        true = dataclasses.replace(target("Edema"), hospital=hospital)
        assert points(reward(said, true, 10))[2] == points_lost
    with pytest.raises(ValueError, match="label_frequency needs shares from 0 to 1"):
        NuancedReward({}, by_hospital={"a": {"Edema": 1.5}})


def test_collapse_waits_for_fifty_predictions():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema")] * 49)
    assert points(reward(answer("Edema"), target("Edema"), 10)) == (100, 50, 0, 0, 0)
    reward.observe([parse_answer("unreadable")] * 60)  # no predictions
    assert points(reward(answer("Edema"), target("Edema"), 10)) == (100, 50, 0, 0, 0)
    reward.observe([answer("Edema")])
    # One dominant label in the answer: 50 + 30.
    assert points(reward(answer("Edema"), target("Edema"), 10)) == (100, 50, 0, -80, 0)


def test_collapse_needs_more_than_seventy_percent():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema")] * 63 + [answer("Fracture")] * 27)  # 63 / 90 is 70 % exactly
    assert reward.dominant_labels() == frozenset()
    reward.observe([answer("Edema", "Pneumonia")])  # 64 / 91 = 70.3 %
    assert reward.dominant_labels() == {"Edema"}


def test_collapse_counts_images_with_all_their_predictions():
    reward = NuancedReward(FREQUENCY)
    # 49 images with four predictions each are 196, but too few images.
    four = [answer("Edema")] * 4
    for _ in range(49):
        reward.observe(four, [0] * 4)
    assert reward.dominant_labels() == frozenset()
    # The fiftieth image has one answer that can be read, 1 of 197 predictions: 196 / 197.
    reward.observe([answer("Fracture"), *[parse_answer("unreadable")] * 3], [3] * 4)
    assert reward.dominant_labels() == {"Edema"}
    # An image of which nothing can be read is none: the window still holds 50.
    reward.observe([parse_answer("unreadable")] * 4, [0] * 4)
    assert len(reward.state_dict()["images"]) == 50


def test_collapse_is_a_share_of_the_predictions_of_the_last_hundred_images():
    reward = NuancedReward(FREQUENCY)
    # 100 images x 4 predictions: 280 of 400 are 70 % exactly. Groups are told by number.
    answers = [answer("Edema")] * 280 + [answer("Fracture")] * 120
    reward.observe(answers, [i % 100 for i in range(400)])
    assert reward.dominant_labels() == frozenset()
    # An image with one prediction takes the place of the oldest, which had four, three of them
    # Edema (0, 100 and 200; 300 is Fracture): 277 + 1 of 397 = 70.03 %.
    reward.observe([answer("Edema")], [0])
    assert reward.dominant_labels() == {"Edema"}


@pytest.mark.parametrize(("share", "most"), [(0.5, 0), (0.55, 0), (0.6, 6)])
def test_a_perfect_policy_is_hardly_ever_told_of_a_collapse(share, most):
    """200 windows in which a label is true of this share of the images.

    With 100 completions of 25 images, a label of 60 % was dominant in one window of six.
    """
    rng, told = random.Random(0), 0
    for _ in range(200):
        reward = NuancedReward(FREQUENCY)
        for image in range(100):
            said = answer("Edema") if rng.random() < share else answer("Fracture")
            reward.observe([said] * 4, [image] * 4)
        told += "Edema" in reward.dominant_labels()
    assert told <= most


@pytest.mark.parametrize(("frequency", "chance"), [(0.0, 10 / 160), (0.5, 30 / 180)])
def test_from_which_chance_on_a_guess_pays_in_eq_4(frequency, chance):
    # Of one label, against no label at all: right 100 + 30 + 20, wrong 10 + 40 f. They weigh the
    # same at p 150 = (1 - p) (10 + 40 f), so p = (10 + 40 f) / (160 + 40 f).
    reward = NuancedReward({"Edema": frequency})
    right, wrong = (
        reward(answer("Edema"), target(true), 300).total for true in ("Edema", "Fracture")
    )
    nothing = reward(answer(), target("Fracture"), 300).total
    assert chance * right + (1 - chance) * wrong == pytest.approx(nothing) == 0


def test_answers_and_their_images_belong_together():
    with pytest.raises(ValueError):
        NuancedReward(FREQUENCY).observe([answer("Edema")] * 2, [0])


def test_collapse_charges_each_dominant_label_that_an_answer_repeats():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema", "Fracture")] * 80 + [answer()] * 20)
    # 50 + 30 for one, 50 + 2 x 30 for both, nothing for an answer that says something else. Being
    # right does not help.
    assert reward(answer("Edema"), target("Edema"), 10).parts["collapse"] == -80
    assert reward(answer("Fracture", "Edema"), target("Edema"), 10).parts["collapse"] == -110
    assert reward(answer("Pneumonia"), target("Edema"), 10).parts["collapse"] == 0
    # Where Fracture cannot be scored (NIH's nine), only Edema counts.
    assert (
        reward(answer("Fracture", "Edema"), target("Edema", evaluated=NIH_NINE), 10).parts[
            "collapse"
        ]
        == -80
    )


def test_window_forgets_all_but_the_last_hundred_predictions():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema")] * 100)
    assert reward.dominant_labels() == {"Edema"}
    reward.observe([answer("Fracture")] * 30)  # 70 of 100 are left
    assert reward.dominant_labels() == frozenset()
    reward.observe([answer("Fracture")] * 41)  # 29 Edema, 71 Fracture
    assert reward.dominant_labels() == {"Fracture"}


def test_calling_a_reward_changes_nothing():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema")] * 50)
    before = reward.state_dict()
    first, *others = [reward(answer("Fracture"), target("Edema"), 10) for _ in range(200)]
    assert first.total == -10  # a false positive of frequency 0; Edema stays dominant
    assert others == [first] * 199
    assert reward.state_dict() == before


def test_window_survives_json():
    reward, resumed = NuancedReward(FREQUENCY), NuancedReward(FREQUENCY)
    reward.observe([answer("Edema", "Fracture")] * 71 + [answer()] * 29)
    reward.observe([answer("Edema", "Fracture"), answer()], [0, 0])  # an image with two
    resumed.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    assert resumed.dominant_labels() == {"Edema", "Fracture"}
    # The order is kept as well: 42 further answers push out 42 of the oldest, which leaves 29 of
    # 100.
    for window in (reward, resumed):
        window.observe([answer("Pneumonia")] * 42)
        assert window.dominant_labels() == frozenset()
    assert resumed.state_dict() == reward.state_dict()


def test_hard_reward_answers_to_the_same_calls_without_memory():
    reward = HardReward()
    reward.observe([answer("Edema")] * 100)
    assert reward.state_dict() == {}
    reward.load_state_dict({})
    assert reward(answer("Edema"), target("Edema"), 300).total == 1.0


def test_a_reward_of_ones_own_needs_only_a_call():
    class Length(RewardFunction):
        def __call__(self, answer, target, completion_length):
            return Reward(completion_length / 4, {"length": completion_length / 4})

    reward = Length()
    reward.observe([answer("Edema")])
    assert reward.state_dict() == {}
    assert reward.scaled(reward(answer("Edema"), target("Edema"), 10)) == 2.5  # 10 / 4, unscaled


def test_the_form_and_the_labels_are_judged_by_one_field_each():
    """Eq. 3 asks for the strict form (`valid`), Eq. 4 for labels that can be read (`parsed`)."""
    numbered, unreadable = answer("1. Edema\n2. Fracture\n3. Pneumonia"), answer("a", "b", "c")
    nuanced, hard = NuancedReward(FREQUENCY), HardReward()
    true = target("Edema", "Fracture", "Pneumonia")
    # A numbered list is a list: 100 for the match, 30 + 20 for recall and precision.
    assert nuanced(numbered, true, 300).total == 150
    assert hard(numbered, true, 300).total == 1
    # Three inventions cost 200 like any answer that cannot be read, not 3 x 100.
    assert nuanced(unreadable, true, 300).parts["format"] == -200
    assert nuanced(unreadable, true, 300).total == -200
    # Its form is right, so Eq. 3 gives J = 0 of 6 and takes the length term of a short one.
    assert hard(unreadable, true, 300).total == 0
    assert hard(unreadable, true, 10).total == -0.1
    # Not even where nothing is true does it count as the empty answer.
    assert hard(unreadable, target(), 300).total == 0
    assert nuanced(unreadable, target(), 300).total == -200
    # It fills no window: it predicts nothing that could be repeated.
    nuanced.observe([unreadable] * 3)
    assert not any(nuanced.state_dict().values())


def test_the_record_of_rewards_has_the_total_before_the_parts():
    record = rewards_record({"hard": Reward(0.4, {"jaccard": 0.5, "length": -0.1})})
    assert record == {"hard": {"total": 0.4, "jaccard": 0.5, "length": -0.1}}
    assert list(record["hard"]) == ["total", "jaccard", "length"]


def test_a_reward_does_not_change_once_it_is_given():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HardReward()(answer("Edema"), target("Edema"), 300).total = 2.0


def test_nuanced_points_are_floored_and_scaled_only_for_training():
    reward = NuancedReward(FREQUENCY)
    # One of two labels and six inventions: 30/2 + 20/1 - 600 = -565 points stay in the log, and
    # training sees max(-565, -300) x 0.01. Inventions alone are an answer that cannot be read.
    raw = reward(answer("Edema", *"abcdef"), target("Edema", "Fracture"), 10)
    assert raw.total == -565
    assert reward.scaled(raw) == pytest.approx(-3.0)
    assert reward.scaled(Reward(150.0, {})) == pytest.approx(1.5)
    assert NuancedReward(FREQUENCY, scale=0.1).scaled(Reward(-40.0, {})) == pytest.approx(-4.0)


def test_parts_sum_to_the_total_and_show_no_negative_zero():
    reward = NuancedReward(FREQUENCY)
    reward.observe([answer("Edema")] * 60)
    for entries in (
        (),
        ("Edema",),
        ("Edema", "Fracture", "nodule"),
        ("Support Devices", "Edema", "Edema"),
    ):
        for function in (HardReward(), reward):
            result = function(answer(*entries), target("Edema", "Pneumonia"), 10)
            assert result.total == sum(result.parts.values())
            assert "-0.0" not in [str(value) for value in result.parts.values()]


@pytest.mark.parametrize(
    "frequency", [{"Edema": 1.5}, {"Edema": -0.1}, {"Edema": float("nan")}, {"edema": 0.1}]
)
def test_label_frequency_must_hold_shares_of_labels(frequency):
    with pytest.raises(ValueError, match="shares from 0 to 1 of the 14 labels, got '[Ee]dema'"):
        NuancedReward(frequency)


def test_a_label_of_none_or_all_of_the_images_is_a_share_too():
    # A false positive costs 10 + 40 x 0 and 10 + 40 x 1.
    reward = NuancedReward({"Fracture": 0.0, "Edema": 1.0})
    assert [
        reward(answer(label), target("Pneumonia"), 10).total for label in ("Fracture", "Edema")
    ] == [-10, -50]


def test_a_window_of_min_window_acts_once_it_is_full():
    reward = NuancedReward(FREQUENCY, window=50)
    reward.observe([answer("Edema")] * 50)
    assert reward.dominant_labels() == {"Edema"}


def test_a_window_that_can_never_act_is_an_error():
    with pytest.raises(ValueError, match="window 40 is below min_window 50"):
        NuancedReward(FREQUENCY, window=40)
