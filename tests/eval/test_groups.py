"""Protect scores by sex, age group and view.

Checked: groups against scikit-learn and by hand, comparisons on the labels that both groups have,
intervals against a plain re-draw of patients, and that nothing is shown of groups too small.

Run: pytest tests/eval/test_groups.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from data.predictions import Prediction, write_predictions
from eval.contrasts import contrast_models
from eval.evaluate import main
from eval.folders import load_answers
from eval.group_tables import format_groups, groups_tables
from eval.groups import Scored, age_group, group_names, group_scores, groups_of
from eval.metrics import drawn_patients
from eval.scores import score
from tests.helpers.reports import ABC, answer, parsed, row

# By hand. 30 women: Edema is true of all and said of 20. 40 men: Edema is true of 10, said of 5 of
# these and of 5 others; Fracture is true of 6 and said of them. Women have no fracture.
WOMEN = [(("Edema",), ("Edema",))] * 20 + [(("Edema",), ())] * 10
MEN = (
    [(("Edema",), ("Edema",))] * 5
    + [(("Edema",), ())] * 5
    + [((), ("Edema",))] * 5
    + [(("Fracture",), ("Fracture",))] * 6
    + [((), ())] * 19
)


def people(*groups: tuple[dict, list]) -> list[Prediction]:
    """Make predictions, each of a patient of its own, with the fields of their group."""
    rows = []
    for fields, answers in groups:
        for true, said in answers:
            text = answer(*said) if said else "<think>x</think><solution></solution>"
            name = f"r{len(rows)}"
            rows.append(row(text, true, id=name) | {"patient_id": name} | fields)
    return parsed(rows)


def hand() -> list[Prediction]:
    return people(({"sex": "F"}, WOMEN), ({"sex": "M"}, MEN))


# ---- who is in which group -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "age, band",
    [
        (0, "0-19"),
        (19, "0-19"),
        (20, "20-39"),
        (39, "20-39"),
        (40, "40-59"),
        (60, "60-79"),
        (79, "60-79"),
        (80, "80+"),
        (120, "80+"),
    ],
)
def test_age_bands(age, band):
    assert age_group(age) == band


def test_names_of_the_groups():
    names = group_names([("F", 61, None), (None, 0, None), ("M", None, None)])
    assert {field: list(groups) for field, groups in names.items()} == {
        "sex": ["F", "", "M"],
        "age": ["60-79", "0-19", ""],
    }
    assert group_names([(None, None, None)]) == {}


def test_rare_views_are_one_group():
    views = ["PA"] * 9 + [f"view {n}" for n in range(11) for _ in range(2)] + ["LPO", "SWIMMERS"]
    names = group_names([(None, None, view) for view in views])["view"]
    # PA and eleven others are the twelve most frequent
    assert list(names[-3:]) == ["view 10", "other", "other"] and len(set(names)) == 13
    rows = people(({}, WOMEN[:3]))
    groups = groups_of(np.array(["other", "pa", ""], dtype=object), Scored.of(rows), resamples=2)
    assert list(groups.groups) == ["pa", "other"]  # last, whatever the others are called


# ---- scores --------------------------------------------------------------------------------------
def test_groups_by_hand():
    found = group_scores(hand())
    women, men = found["groups"]["sex"]["F"], found["groups"]["sex"]["M"]
    assert (women["n"], women["num_patients"], men["n"]) == (30, 30, 40)
    # F: TP 20, FN 10: 40 / 50. M: Edema TP 5, FN 5, FP 5: 10 / 20; Fracture 1.
    assert women["micro_f1"] == pytest.approx(0.8)
    assert men["micro_f1"] == pytest.approx(22 / 32)  # TP 11, FN 5, FP 5
    # Over all three labels with zeros kept, men look better served: women have no fracture to find
    assert women["macro_f1"] == pytest.approx(0.8 / 3)
    assert men["macro_f1"] == pytest.approx((0.5 + 1) / 3)
    # On the label that both have, it is the other way round
    compared = found["group_differences"]["sex"]
    assert (compared["labels"], compared["reference"]) == (["Edema"], "M")
    assert women["macro_f1_shared"] == pytest.approx(0.8)
    assert men["macro_f1_shared"] == pytest.approx(0.5)
    moved = compared["groups"]["F"]
    assert moved["macro_f1_shared"]["difference"] == pytest.approx(0.3)
    assert moved["micro_f1"]["difference"] == pytest.approx(0.8 - 22 / 32)
    # Jaccard F: 20 of 30. M: 5 + 6 + 19 right of 40.
    assert moved["jaccard"]["difference"] == pytest.approx(20 / 30 - 30 / 40)
    low, high = moved["macro_f1_shared"]["interval"]
    assert low < 0.3 < high
    json.dumps(found)


def test_a_group_alone_scores_as_its_rows_do():
    """The groups are what scoring the rows of each alone gives, and what scikit-learn gives."""
    rows = hand()
    women = [one for one in rows if one.sex == "F"]
    found, alone = group_scores(rows)["groups"]["sex"]["F"], score(women)
    assert (found["micro_f1"], found["macro_f1"], found["jaccard"]) == pytest.approx(
        (alone["micro"]["f1"], alone["macro"]["f1"], alone["jaccard"])
    )
    truth, said = (
        [[label in names for label in ABC] for names in sets]
        for sets in ([one.labels for one in women], [one.answer.labels for one in women])
    )
    assert found["macro_f1"] == pytest.approx(
        f1_score(truth, said, average="macro", zero_division=0)
    )


def test_votes_have_an_auroc_in_each_group():
    rng = np.random.default_rng(0)
    rows = hand()
    women = [one for one in hand()][:30]
    rows += parsed(
        [
            one.to_row() | {"id": f"n{n}", "patient_id": f"n{n}", "labels": []}
            for n, one in enumerate(women)
        ]
    )
    shares = rng.integers(0, 5, len(rows)) / 4
    votes = [one.with_extra(vote_shares={"Edema": s}) for one, s in zip(rows, shares, strict=True)]
    found = group_scores(votes)
    for sex in "FM":
        chosen = np.array([one.sex == sex for one in votes])
        truth = np.array(["Edema" in one.labels for one in votes])
        expected = roc_auc_score(truth[chosen], shares[chosen])
        group = found["groups"]["sex"][sex]
        assert group["macro_auroc"] == pytest.approx(expected)
        low, high = group["intervals"]["macro_auroc"]
        assert low < expected < high
    # images whose source cannot express a label say nothing of its shares
    more = [
        one.to_row()
        | {"id": f"m{n}", "evaluated_labels": ["Fracture"], "vote_shares": {"Edema": 1.0}}
        for n, one in enumerate(votes)
    ]
    with_more = group_scores([*votes, *parsed(more)])
    for sex in "FM":
        auroc = with_more["groups"]["sex"][sex]["macro_auroc"]
        assert auroc == found["groups"]["sex"][sex]["macro_auroc"]
    values = [found["groups"]["sex"][sex]["macro_auroc"] for sex in "MF"]
    moved = found["group_differences"]["sex"]
    assert moved["reference"] == "F"  # 60 images
    assert moved["groups"]["M"]["macro_auroc"]["difference"] == pytest.approx(values[0] - values[1])


def test_a_label_is_shared_from_five_positives_in_each_group_on():
    few = [(("Pneumonia",), ("Pneumonia",))]
    for number, labels in ((4, ["Edema"]), (5, ["Edema", "Pneumonia"])):
        rows = people(({"sex": "F"}, WOMEN + few * number), ({"sex": "M"}, MEN + few * 9))
        assert group_scores(rows)["group_differences"]["sex"]["labels"] == labels


def test_small_and_unknown_groups_are_not_compared():
    small = people(({"sex": "F"}, WOMEN[:29]), ({"sex": "M"}, MEN), ({}, MEN[:3]))
    found = group_scores(small)
    assert found["group_differences"] == {}
    women, men = found["groups"]["sex"]["F"], found["groups"]["sex"]["M"]
    assert women["n"] == 29 and "intervals" not in women and "macro_f1_shared" not in women
    # too small to be compared, but shown; a single large group has nothing to be compared with
    assert women["micro_f1"] == pytest.approx(40 / 49) and "macro_f1_shared" not in men
    assert list(men["intervals"]) == ["macro_f1", "micro_f1", "jaccard"]
    assert format_groups({"site": score(small) | found}) == ""


def test_nothing_is_known_of_anybody():
    rows = people(({}, MEN))
    assert group_scores(rows) == {} and format_groups({"site": score(rows)}) == ""


def test_a_failed_answer_names_nothing_in_its_group():
    rows = people(({"sex": "F"}, WOMEN), ({"sex": "M"}, MEN))
    twice = {"completion": "<solution>Edema</solution><solution>Edema</solution>"}
    broken = parsed([one.to_row() | (twice if n < 5 else {}) for n, one in enumerate(rows)])
    # five of the women's 20 hits are lost: TP 15, FN 15
    assert group_scores(broken)["groups"]["sex"]["F"]["micro_f1"] == pytest.approx(30 / 45)


# ---- intervals -----------------------------------------------------------------------------------
def test_intervals_are_those_of_a_plain_re_draw_of_patients():
    rows = hand()
    found = group_scores(rows, resamples=4000)
    rng = np.random.default_rng(5)
    women = np.array([True] * 20 + [False] * 10)
    men = np.array([[1, 0, 0]] * 5 + [[0, 1, 0]] * 5 + [[0, 0, 1]] * 5 + [[0, 0, 0]] * 25)

    def drawn() -> tuple[float, float]:
        hits = rng.choice(women, 30).sum()
        tp, fn, fp = men[rng.integers(0, 40, 40)].sum(axis=0)
        return 2 * hits / (30 + hits), 2 * tp / max(2 * tp + fn + fp, 1)

    naive = np.array([drawn() for _ in range(4000)])
    for name, values in (("F", naive[:, 0]), ("M", naive[:, 1])):
        expected = np.percentile(values, [2.5, 97.5])
        shown = found["groups"]["sex"][name]["intervals"]["macro_f1_shared"]
        assert shown == pytest.approx(expected, abs=0.02)
    moved = found["group_differences"]["sex"]["groups"]["F"]["macro_f1_shared"]["interval"]
    expected = np.percentile(naive[:, 0] - naive[:, 1], [2.5, 97.5])
    assert moved == pytest.approx(expected, abs=0.02)


def two_views(said_of_ap: list) -> list[Prediction]:
    """Make two images of each of 40 patients, PA and AP."""
    rows = []
    for view, answers in (("PA", MEN), ("AP", said_of_ap)):
        for n, (true, said) in enumerate(answers):
            text = answer(*said) if said else "<think>x</think><solution></solution>"
            rows.append(row(text, true, id=f"{view}{n}") | {"patient_id": f"p{n}", "view": view})
    return parsed(rows)


def test_groups_that_share_patients_are_drawn_together():
    """Each patient scores alike in both views, so no draw of patients can make them differ."""
    moved = group_scores(two_views(MEN))["group_differences"]["view"]
    assert moved["reference"] == "AP"  # of equal ones the first
    assert moved["groups"]["PA"]["macro_f1_shared"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    # drawn apart, as sexes are, the same answers have an interval of some width
    apart = people(({"sex": "F"}, MEN), ({"sex": "M"}, MEN))
    low, high = group_scores(apart)["group_differences"]["sex"]["groups"]["M"]["jaccard"][
        "interval"
    ]
    assert low < -0.1 and high > 0.1


def test_a_group_is_drawn_from_its_own_patients():
    """Of 70 patients the views share 10. A draw of all 70 counts in a view those that are in it."""
    rows = two_views(MEN)
    rows = [one for one in rows if one.view == "PA" or int(one.id[2:]) < 10]
    others = [one.to_row() for one in people(({"view": "AP"}, WOMEN))]
    others = [row | {"id": f"x{n}", "patient_id": f"a{n}"} for n, row in enumerate(others)]
    rows += parsed(others)  # before the others in the order of patients
    names = group_names([(one.sex, one.age, one.view) for one in rows])["view"]
    drawn = groups_of(names, Scored.of(rows), seed=2, resamples=30).groups["PA"].drawn["jaccard"]
    everyone = sorted({one.patient_id for one in rows})
    weights = next(drawn_patients(len(everyone), seed=2, resamples=30))  # [30, 70]
    right = {f"p{n}": true == said for n, (true, said) in enumerate(MEN)}
    expected = [
        np.average([right[p] for p in right], weights=[times[everyone.index(p)] for p in right])
        for times in weights
    ]
    assert drawn == pytest.approx(expected)


def test_a_group_apart_is_drawn_without_regard_to_the_others():
    fewer = people(({"sex": "F"}, WOMEN), ({"sex": "M"}, MEN[:30]))
    drawn = [
        groups_of(
            group_names([(one.sex, one.age, one.view) for one in rows])["sex"],
            Scored.of(rows),
            resamples=30,
        )
        .groups["F"]
        .drawn["jaccard"]
        for rows in (hand(), fewer)
    ]
    assert (drawn[0] == drawn[1]).all()


def test_two_models_are_drawn_alike_in_a_group():
    scored = Scored.of(hand())
    names = group_names([(one.sex, one.age, one.view) for one in hand()])["sex"]
    first, second = (groups_of(names, scored, seed=3, resamples=50) for _ in range(2))
    for name in ("F", "M"):
        same = first.groups[name].drawn["jaccard"] - second.groups[name].drawn["jaccard"]
        assert not same.any()
    other = groups_of(names, scored, seed=4, resamples=50)
    assert (first.groups["F"].drawn["jaccard"] != other.groups["F"].drawn["jaccard"]).any()


# ---- shown ---------------------------------------------------------------------------------------
def test_the_console_table(tmp_path, capsys):
    rows = hand() + people(({"age": 5}, [((), ())] * 3))
    rows = parsed([one.to_row() | {"id": f"x{n}"} for n, one in enumerate(rows)])
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    command = ["--predictions", f"site={file}", "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("site, by sex") :].splitlines()
    assert table[0].split() == ["site,", "by", "sex", "n", "macro-F1", "micro-F1", "Jaccard"]
    # name, n, macro-F1 and its interval, micro-F1 and its, Jaccard and its
    assert [line.split()[::2][:4] for line in table[1:3]] == [
        ["F", "0.800", "0.800", "0.667"],
        ["M", "0.500", "0.688", "0.750"],
    ]
    assert [line.split()[1] for line in table[1:3]] == ["30", "40"]
    assert table[3].split()[:4] == ["F", "minus", "M", "+0.300"]
    assert table[4:6] == [
        "  macro-F1 on 1 label",
        "  fewer than 30 images, or unknown: unknown 3",
    ]
    assert "by age" not in printed and all(len(line) <= 100 for line in table[:8])
    kept = json.loads((tmp_path / "out" / "scores-site.json").read_text())
    assert kept["groups"]["age"]["0-19"]["n"] == 3 and list(kept["group_differences"]) == ["sex"]


def test_the_report_shows_each_model_in_each_group(tmp_path):
    def contrast(better: list) -> tuple:
        before = write_predictions(tmp_path / "a.jsonl", hand())
        after = people(({"sex": "F"}, better), ({"sex": "M"}, MEN))
        files = {"SFT": before, "GRPO": write_predictions(tmp_path / "b.jsonl", after)}
        answers = {name: load_answers(file) for name, file in files.items()}
        made = contrast_models("site", answers, (), resamples=20, permutations=20)
        return groups_tables(made, [("SFT", "GRPO")])

    # GRPO finds all of the women's edemas: 0.8 -> 1, and says of men what SFT says
    [table] = contrast([(("Edema",), ("Edema",))] * 30)
    assert table.caption == "Scores on site by sex"
    shown = [
        [cell if isinstance(cell, str) else cell.text for cell in cells] for cells in table.rows
    ]
    assert shown == [
        ["F", "30", "SFT", "0.800", "0.800", "0.667", "+0.300", "-"],
        ["", "", "GRPO", "1.000", "1.000", "1.000", "+0.500", "+0.200"],
        ["M", "40", "SFT", "0.500", "0.688", "0.750", "the largest", "-"],
        ["", "", "GRPO", "0.500", "0.688", "0.750", "the largest", "+0.000"],
    ]
    assert table.rows[1][-1].tone == "gain"
    assert table.rows[3][-1].detail == "+0.000 to +0.000"  # the same answers, drawn alike
    assert "at least 5 positives in each group: Edema." in table.notes[0]


def test_a_report_without_large_groups_has_no_table(tmp_path):
    file = write_predictions(tmp_path / "a.jsonl", people(({"sex": "F"}, WOMEN), ({}, MEN)))
    made = contrast_models("site", {"m": load_answers(file)}, (), resamples=20, permutations=20)
    assert groups_tables(made, []) == []
