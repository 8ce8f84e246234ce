"""Protect the two rewards that do not silence rare labels.

Checked: weights and credits by hand, what blind answers earn, that memory counts images, forgets,
survives JSON and keeps hospitals apart; bounds and order as properties.

Run: pytest tests/rl/test_label_rewards.py
"""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.answers import parse_answer
from data.labels import LABELS, NIH_NINE, Target
from rl.label_rewards import FBetaReward, WeightedReward
from rl.rewards import HardReward

# 1/sqrt(p): 2, 4 and, since no label counts as rarer than 1/50, sqrt(50) for a label never seen
PREVALENCE = {"Edema": 1 / 4, "Fracture": 1 / 16, "Pneumonia": 0.0}
EDEMA, FRACTURE, PNEUMONIA = 2, 4, math.sqrt(50)
MEAN = (EDEMA + FRACTURE + PNEUMONIA) / 3


def answer(*entries: str):
    return parse_answer(f"<think>x</think><solution>{', '.join(entries)}</solution>")


def target(*labels: str, evaluated=LABELS, hospital=None) -> Target:
    return Target(frozenset(labels), frozenset(evaluated), hospital)


INVALID = parse_answer("<solution>Edema</solution>")  # no reasoning


# ---- the weighted Jaccard index ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "true", "expected"),
    [
        (("Edema", "Fracture"), ("Edema", "Fracture"), 1.0),
        # 2 of 2 + 4, where Eq. 3 gives 1/2; the rare one alone is worth 4 of 6
        (("Edema",), ("Edema", "Fracture"), 2 / 6),
        (("Fracture",), ("Edema", "Fracture"), 4 / 6),
        # a wrong one enlarges the union by its own weight
        (("Edema", "Fracture"), ("Edema",), 2 / 6),
        (("Edema", "Pneumonia"), ("Edema",), EDEMA / (EDEMA + PNEUMONIA)),
        ((), ("Edema",), 0.0),
        ((), (), 1.0),  # convention of Eq. 3
        # what is no label weighs 1, the mean weight, so MEAN beside the 2 of Edema; twice is once
        (("Edema", "nodule", "Nodule"), ("Edema",), EDEMA / (EDEMA + MEAN)),
    ],
)
def test_the_weighted_index_by_hand(said, true, expected):
    reward = WeightedReward(PREVALENCE)(answer(*said), target(*true), 0)
    assert reward.total == pytest.approx(expected) and reward.parts == {
        "weighted_jaccard": reward.total
    }


def test_an_invalid_answer_earns_nothing():
    assert WeightedReward(PREVALENCE)(INVALID, target("Edema"), 300).total == 0


def test_labels_that_cannot_be_expressed_do_not_count():
    true = target("Edema", "Support Devices", evaluated=NIH_NINE)
    assert WeightedReward(PREVALENCE)(answer("Edema", "Lung Opacity"), true, 300).total == 1


def test_each_hospital_has_its_own_weights():
    # At b, Edema is as rare as 1/16 and Fracture as common as 1/4: 4 and 2.
    reward = WeightedReward(PREVALENCE, {"b": {"Edema": 1 / 16, "Fracture": 1 / 4}})
    for hospital, expected in {"b": 4 / 6, "a": 2 / 6, None: 2 / 6}.items():
        true = target("Edema", "Fracture", hospital=hospital)
        assert reward(answer("Edema"), true, 0).total == pytest.approx(expected)


def test_equal_prevalence_is_eq_3():
    reward, hard = WeightedReward(dict.fromkeys(LABELS, 0.1)), HardReward(length_penalty=0)
    for said in (("Edema",), ("Edema", "nodule"), ("Fracture", "Pneumonia"), ()):
        for true in (("Edema", "Fracture"), ()):
            given_both = answer(*said), target(*true), 300
            assert reward(*given_both).total == pytest.approx(hard(*given_both).total)
            assert WeightedReward({})(*given_both).total == pytest.approx(hard(*given_both).total)


# ---- credit by label -----------------------------------------------------------------------------
# The mean of max(p, 1/50) over the table: (1/4 + 1/16 + 1/50) / 3.
MEAN_P = (0.25 + 0.0625 + 0.02) / 3


def test_at_the_start_a_right_label_is_worth_the_mean_prevalence_over_its_own():
    # F = 1/2 from the counts before, D = 2 x 50 p, unit = 2 x 50 mean(p) / 1.5:
    # right 1.5 unit / D = mean(p) / p, wrong a third of it.
    reward = FBetaReward(PREVALENCE)
    for label, p in {"Edema": 1 / 4, "Fracture": 1 / 16, "Pneumonia": 1 / 50}.items():
        right, wrong = reward.worth(label)
        assert right == pytest.approx(MEAN_P / p) and wrong == pytest.approx(MEAN_P / p / 3)
    # Over true labels, each p as often as it is true: sum of p x mean(p) / p = 3 mean(p) = sum of p
    assert sum(reward.worth(label)[0] * p for label, p in PREVALENCE.items() if p) + (
        reward.worth("Pneumonia")[0] / 50
    ) == pytest.approx(3 * MEAN_P)
    parts = reward(answer("Edema", "Fracture", "nodule"), target("Edema"), 0).parts
    assert parts["right"] == pytest.approx(MEAN_P * 4)
    assert parts["wrong"] == pytest.approx(-MEAN_P * 16 / 3)
    assert parts["unknown"] == pytest.approx(-1 / 3)  # 0.5 / (2 - 0.5)
    assert parts["format"] == 0


def test_a_window_by_hand():
    # Edema, p = 1/4, prior 8 images, so 2 true ones before. Four images, one of them with two
    # answers: said and right in 1 + 1/2, said and wrong in 1, true in 2.
    # TP = 1.5 + 0.5 x 2 = 2.5, S = 2.5 + 2 = 4.5, P = max(2, 4/4) + 2 = 4: D = 8.5, F = 5 / 8.5
    # unit = 2 x (4 + 8) mean(p) / 1.5 = 16 mean(p)
    reward = FBetaReward(PREVALENCE, prior=8)
    edema, other = answer("Edema"), answer("Fracture")
    reward.observe(
        [edema, edema, other, edema, other],
        [0, 1, 1, 2, 3],
        [*[target("Edema")] * 3, *[target("Fracture")] * 2],
    )
    right, wrong = reward.worth("Edema")
    assert right == pytest.approx(16 * MEAN_P * (2 - 5 / 8.5) / 8.5)
    assert wrong == pytest.approx(16 * MEAN_P * (5 / 8.5) / 8.5)


def test_beta_above_1_makes_wrong_labels_cheaper():
    # b^2 = 4. At the start F = 1/2 and D = 5 x 50 p, unit = 5 x 50 mean(p) / 4.5: right is
    # mean(p) / p, wrong 0.5 / 4.5 of it, a ninth and not a third.
    right, wrong = FBetaReward(PREVALENCE, beta=2.0).worth("Edema")
    assert right == pytest.approx(4 * MEAN_P) and wrong == pytest.approx(4 * MEAN_P / 9)


def test_a_window_with_few_true_ones_does_not_raise_their_price():
    # None of 4 images has Edema, one in 4 is expected: P = 1 + 2 and not 0 + 2. S = 0 + 2, TP = 1:
    # D = 5, F = 2/5.
    reward = FBetaReward(PREVALENCE, prior=8)
    reward.observe([answer()] * 4, None, [target("Fracture")] * 4)
    assert reward.worth("Edema")[0] == pytest.approx(16 * MEAN_P * (2 - 2 / 5) / 5)


def test_a_silenced_label_is_worth_more_and_its_mistakes_less():
    start, silenced = FBetaReward(PREVALENCE), FBetaReward(PREVALENCE)
    silenced.observe([answer()] * 400, None, [target("Fracture"), *[target()] * 15] * 25)
    # D = 25 + 50/16 + 50/16 = 31.25, F = 2 x 50/32 / 31.25 = 0.1; unit = 2 x 450 mean(p) / 1.5
    right, wrong = silenced.worth("Fracture")
    assert right == pytest.approx(600 * MEAN_P * 1.9 / 31.25)
    assert wrong == pytest.approx(600 * MEAN_P * 0.1 / 31.25)
    assert right > 2 * start.worth("Fracture")[0] and wrong < start.worth("Fracture")[1] / 2


def test_an_invalid_answer_costs_a_typical_label_and_nothing_costs_more():
    reward = FBetaReward(PREVALENCE, scale=2.0)
    assert reward(INVALID, target("Edema"), 300).parts == {
        "right": 0,
        "wrong": 0,
        "unknown": 0,
        "format": -1,
    }
    everything_wrong = reward(answer(*LABELS), target(), 0)
    assert everything_wrong.total < -1 and reward.scaled(everything_wrong) == -2
    assert reward.scaled(reward(answer(), target("Edema"), 0)) == 0


def test_the_window_forgets_and_survives_json():
    reward = FBetaReward(PREVALENCE, window=3)
    for said in ("Edema", "Fracture", "Pneumonia", "Edema"):
        reward.observe([answer(said), answer()], [0, 0], [target("Edema")] * 2)
    state = json.loads(json.dumps(reward.state_dict()))
    assert [image[3] for image in state["images"]] == [
        {"Fracture": 0.5},
        {"Pneumonia": 0.5},
        {"Edema": 0.5},
    ]
    resumed = FBetaReward(PREVALENCE, window=3)
    resumed.load_state_dict(state)
    for one in (reward, resumed):
        one.observe([answer("Fracture", "nodule"), INVALID], [7, 7], [target("Fracture")] * 2)
    assert resumed.state_dict() == reward.state_dict()
    assert [resumed.worth(label) for label in LABELS] == [reward.worth(label) for label in LABELS]


def test_it_remembers_nothing_without_targets():
    reward = FBetaReward(PREVALENCE)
    reward.observe([answer("Edema")], [0])
    assert reward.state_dict() == {"images": []}


def test_hospitals_are_counted_apart_and_only_by_what_they_can_express():
    tables = {"a": PREVALENCE, "b": PREVALENCE}
    reward = FBetaReward(PREVALENCE, tables, prior=8)
    at_a = [target("Edema", hospital="a"), target(hospital="a"), target(hospital="a")]
    at_b = [target(evaluated=["Fracture"], hospital="b")]
    reward.observe([answer("Edema")] * 4, None, at_a + at_b)
    # At a: TP = 1 + 1, S = 3 + 2, P = 1 + 2: D = 8, F = 4/8; unit = 2 x 11 mean(p) / 1.5
    assert reward.worth("Edema", "a")[1] == pytest.approx(22 / 1.5 * MEAN_P * 0.5 / 8)
    # b cannot express Edema, so it stands as at the start
    assert reward.worth("Edema", "b") == FBetaReward(PREVALENCE, tables, prior=8).worth("Edema")
    # of no hospital, as in an evaluation: all images that can express the label
    assert reward.worth("Edema") == pytest.approx(reward.worth("Edema", "a"))


# ---- what blind answers earn ---------------------------------------------------------------------
# 100 images of a hospital: 44 with No Finding, 13 findings on 8 images each, spread over the others
FINDINGS = [label for label in LABELS if label != "No Finding"]
SLOTS = [label for label in FINDINGS for _ in range(8)]
HOSPITAL = [target("No Finding")] * 44 + [target(*SLOTS[i::56]) for i in range(56)]
SHARES = {"No Finding": 0.44} | dict.fromkeys(FINDINGS, 0.08)
MEAN_SHARE = 1.48 / 14


def earned(reward, policy) -> float:
    """What a policy earns an image, once the window has seen its answers."""
    said = [policy(image) for image in HOSPITAL]
    reward.observe(said, None, HOSPITAL)
    pairs = zip(said, HOSPITAL, strict=True)
    return sum(reward.scaled(reward(one, image, 300)) for one, image in pairs) / len(HOSPITAL)


def test_blind_answers_earn_hardly_anything_by_label():
    def by_label():
        return FBetaReward(SHARES, window=100, prior=1e-12)

    # Always right: F = 1, D = 2 n p, so a right label earns unit / D = (2 n mean / 1.5) / (2 n p),
    # and an image sum of p x mean / p / 1.5 = 14 mean / 1.5 = 1.48 / 1.5.
    right = earned(by_label(), lambda image: answer(*image.labels))
    assert right == pytest.approx(1.48 / 1.5)
    # Always one label of share p: F = 2 p / (1 + p), D = n (1 + p). An image earns
    # (2 p - F) unit / D = 2 p^2 / (1 + p) x 2 mean / 1.5 / (1 + p) = (8/3) mean (p / (1 + p))^2.
    blind = {p: 8 / 3 * MEAN_SHARE * (p / (1 + p)) ** 2 for p in (0.44, 0.08)}
    always = earned(by_label(), lambda image: answer("No Finding"))
    assert always == pytest.approx(blind[0.44]) and round(always, 3) == 0.026
    everything = earned(by_label(), lambda image: answer(*LABELS))
    assert everything == pytest.approx(blind[0.44] + 13 * blind[0.08])
    assert round(everything, 3) == 0.046
    assert earned(by_label(), lambda image: answer()) == 0
    assert earned(by_label(), lambda image: INVALID) == -1


def test_all_labels_lose_at_the_start():
    # A policy with F = 1/2: a label of share p earns (2 p - 0.5) mean / (1.5 p): 0.38 for No
    # Finding and -0.34 for a finding. 0.1057 / 1.5 x (0.38 / 0.44 - 13 x 0.34 / 0.08) = -3.83.
    reward = FBetaReward(SHARES)
    total = sum(reward(answer(*LABELS), image, 300).total for image in HOSPITAL) / 100
    assert total == pytest.approx(MEAN_SHARE / 1.5 * (0.38 / 0.44 - 13 * 0.34 / 0.08))
    assert total < -3


def test_blind_answers_under_the_weighted_index():
    weighted = WeightedReward(SHARES)
    # Always No Finding is right on its 44 images and wrong on the others, as in Eq. 3.
    assert earned(weighted, lambda image: answer("No Finding")) == pytest.approx(0.44)
    assert earned(weighted, lambda image: answer()) == 0
    # All labels: 44 images with weight a = 1/sqrt(0.44) and 104 true findings with b = 1/sqrt(0.08)
    # of a + 13 b = 1.508 + 45.96. (44 x 1.508 + 104 x 3.536) / 100 / 47.47 = 0.0914.
    a, b = 0.44**-0.5, 0.08**-0.5
    everything = earned(weighted, lambda image: answer(*LABELS))
    assert everything == pytest.approx((0.44 * a + 1.04 * b) / (a + 13 * b))
    assert round(everything, 4) == 0.0914


# ---- properties ----------------------------------------------------------------------------------
label_sets = st.sets(st.sampled_from(LABELS), max_size=5)
tables = st.dictionaries(st.sampled_from(LABELS), st.floats(0, 1))


@settings(max_examples=40, deadline=None)
@given(tables, label_sets, label_sets, st.sampled_from(LABELS))
def test_the_weighted_index_is_bounded_and_rises_with_a_right_label(table, said, true, more):
    reward = WeightedReward(table)
    before = reward(answer(*sorted(said)), target(*true), 0).total
    assert 0 <= before <= 1
    assert (before == 1) == (said == true)
    if more not in said:
        after = reward(answer(*sorted(said | {more})), target(*true), 0).total
        assert after > before if more in true else after <= before


@settings(max_examples=40, deadline=None)
@given(tables, st.lists(st.tuples(label_sets, label_sets), max_size=12), label_sets, label_sets)
def test_credit_is_bounded_and_rises_with_a_right_label(table, seen, said, true):
    reward = FBetaReward(table)
    reward.observe(
        [answer(*sorted(one)) for one, _ in seen], None, [target(*one) for _, one in seen]
    )
    mean = sum(max(p, 0.02) for p in table.values()) / len(table) if table else None
    for label in LABELS:
        p = max(table.get(label, 0.0), 0.02)
        right, wrong = reward.worth(label)
        # (2 - F) unit / D with F >= 0 and D >= (n + prior) p; F <= 1 and right + wrong = 2 unit / D
        assert 0 < wrong <= right <= 2 * 2 / 1.5 * (mean or p) / p * (1 + 1e-9)
    total = reward(answer(*sorted(said)), target(*true), 0).total
    for label in set(LABELS) - said:
        after = reward(answer(*sorted(said | {label})), target(*true), 0).total
        assert after > total if label in true else after < total
