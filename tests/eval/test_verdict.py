"""Protect what a report says and draws first.

Checked by hand: the sentence about the last step, which label is said in place of which, which
labels are silenced, and that the pictures hold what their tables hold.

Run: pytest tests/eval/test_verdict.py
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from data.labels import LABELS
from eval.compare import differences_table
from eval.confusion import NOTHING, heat_map, said_in_place, silenced_in, silenced_table
from eval.contrasts import transfers
from eval.page import Cell, Table, Text
from eval.pictures import NARROW, WIDE, dumbbell_picture, labels_picture
from eval.tables import movers_table
from eval.transfer_tables import paradox_table, reading, transfer_table
from eval.verdict import last_step, verdict
from tests.helpers.reports import AFTER, BEFORE, answer, compared, parsed, row, texts

STEP = ("base", "sft")


def rows_of(said: dict[int, str], n: int = 40, evaluated=LABELS, true=("Edema",)) -> list:
    """Make n answers to n patients: what `said` names from an image on, up to the next one."""
    rows = []
    now = ""
    for image in range(n):
        now = said.get(image, now)
        rows.append(
            row(
                answer(*now.split("+")),
                true,
                id=f"i{image}",
                patient=f"p{image}",
                evaluated=evaluated,
            )
        )
    return parsed(rows)


# ---- the sentence --------------------------------------------------------------------------------
def test_a_rise_needs_an_interval_without_zero(tmp_path):
    """Forty patients with Edema. Right in none before and in all after: macro-F1 0 to 1/14."""
    home = compared(tmp_path, rows_of({0: "Fracture"}), rows_of({0: "Edema"}))
    lead = verdict([home], STEP, None)
    assert lead.text == "sft against base: macro-F1 rises by 0.071 on home."
    assert lead.details[0] == (  # no permutation of 200 is as extreme: p = 1/201
        "home: macro-F1 0.000 \u2192 0.071, +0.071 (95 % +0.071 to +0.071), p 0.005; micro-F1"
        " +1.000 (95 % +1.000 to +1.000); 14 labels, 40 images of 40 patients"
    )
    back = compared(tmp_path, rows_of({0: "Edema"}), rows_of({0: "Fracture"}))
    # and the label that was said of all is now said of none
    assert verdict([back], STEP, None).text == (
        "sft against base: macro-F1 falls by 0.071 on home; Edema is hardly said any more."
    )


def test_what_is_not_clear_is_said_to_be_so_with_n(tmp_path):
    # One of forty is right before, two are after: half of the resamples of patients lack both, so
    # the interval holds 0.
    before = rows_of({0: "Edema", 1: "Fracture"})
    after = rows_of({0: "Edema", 2: "Fracture"})
    home, away = (compared(tmp_path, before, after, name) for name in ("home", "away"))
    expected = "sft against base: no clear change of macro-F1 at n = 40 on home or away."
    assert verdict([home, away], STEP, None).text == expected
    small = compared(tmp_path, before[:30], after[:30], "small")
    assert verdict([home, small], STEP, None).text == (
        "sft against base: no clear change of macro-F1 on home at n = 40 or small at n = 30."
    )
    right = compared(tmp_path, rows_of({0: "Fracture"}), rows_of({0: "Edema"}), "right")
    assert verdict([right, home], STEP, None).text == (
        "sft against base: macro-F1 rises by 0.071 on right and no clear change at n = 40 on home."
    )


def test_fewer_than_twenty_patients_give_no_verdict(tmp_path):
    """Nineteen patients, all wrong before and right after: the interval is a point, and no news."""
    few = compared(tmp_path, rows_of({0: "Fracture"}, 19), rows_of({0: "Edema"}, 19))
    lead = verdict([few], STEP, None)
    assert lead.text == "sft against base: no clear change of macro-F1 at n = 19 on home."
    assert lead.details[0].endswith("19 patients, too few for an interval to be trusted")
    enough = compared(tmp_path, rows_of({0: "Fracture"}, 20), rows_of({0: "Edema"}, 20))
    assert "rises" in verdict([enough], STEP, None).text


def test_p_values_of_the_evidence_are_adjusted_for_the_data_sets(tmp_path):
    """Edema right in none of forty and then in all: p = 1/201, of two sets twice that, 0.00995.
    The other set's one in forty against two is far from it, and stays as it is.
    """
    clear = compared(tmp_path, rows_of({0: "Fracture"}), rows_of({0: "Edema"}))
    unclear = compared(
        tmp_path, rows_of({0: "Edema", 1: "Fracture"}), rows_of({0: "Edema", 2: "Fracture"}), "away"
    )
    alone = unclear.change(*STEP, "macro_f1").p_value
    first, second = verdict([clear, unclear], STEP, None).details[:2]
    assert "(95 % +0.071 to +0.071), p 0.010 (Holm, 2 data sets); micro-F1" in first
    assert alone > 0.1 and f", p {alone:.3f} (Holm, 2 data sets); micro-F1" in second


def test_fewer_than_twenty_patients_give_no_reading(tmp_path):
    for patients, words in (
        (19, "at home: no clear change; elsewhere: not measured"),
        (20, "at home: gains; elsewhere: not measured"),
    ):
        home = compared(
            tmp_path, rows_of({0: "Fracture"}, patients), rows_of({0: "Edema"}, patients)
        )
        [transfer] = transfers([home], ["home"], [STEP])
        assert transfer.num_patients == patients and reading(transfer) == words


@pytest.mark.parametrize("patients, tone", [(19, ""), (20, "gain")])
def test_tables_set_off_what_sentences_call_clear(tmp_path, patients, tone):
    home = compared(tmp_path, rows_of({0: "Fracture"}, patients), rows_of({0: "Edema"}, patients))
    found = transfers([home], ["home"], [STEP])
    differences = differences_table(home, "base")
    moved = [
        transfer_table([home], ["home"], [STEP]).rows[0][5],
        paradox_table(found).rows[0][1],
        movers_table(home, *STEP).rows[0][4],  # Edema, the largest gain
        *(row[4] for row in differences.rows),
    ]
    assert len(differences.rows) == 3 and [cell.tone for cell in moved] == [tone] * 6


def test_the_gap_is_that_of_the_labels_that_both_sides_can_express(tmp_path):
    """At home Edema goes from wrong to right, elsewhere it stays right: on the one shared label
    macro-F1 rises by 1 at home and by 0 elsewhere. On all labels of each side it would be 1/14.
    """
    home = compared(tmp_path, rows_of({0: "Fracture"}), rows_of({0: "Edema"}))
    same = rows_of({0: "Edema"}, evaluated=("Edema",))
    away = compared(tmp_path, same, same, "away")
    [transfer] = transfers([home, away], ["home"], [STEP])
    assert verdict([home, away], STEP, transfer).text == (
        "sft against base: macro-F1 rises by 0.071 on home and no clear change at n = 40 on away;"
        " on the labels that both sides can express it did 1.000 more at home than elsewhere."
    )


def test_answers_that_could_not_be_read_are_said_from_one_in_twenty_on(tmp_path):
    """Of forty answers two without a readable label: 5 %. One is 2.5 %, and no news."""
    right = rows_of({0: "Edema"})
    for bad, told in ((2, True), (1, False)):
        rows = parsed(
            [
                row(
                    answer("Hydrothorax"), ("Edema",), id=f"i{n}", patient=f"p{n}", evaluated=LABELS
                )
                for n in range(bad)
            ]
        )
        lead = verdict([compared(tmp_path, right, [*rows, *right[bad:]])], STEP, None)
        line = (
            "answers of sft that could not be read in full: home 5 % failed, 5 % without any label,"
            " 5 % with an unknown entry"
        )
        assert (line in lead.details) is told


def test_one_model_is_set_beside_the_best_answer_without_an_image(tmp_path):
    contrast = compared(tmp_path, BEFORE, AFTER)
    lead = verdict([contrast], None, None)
    assert lead.text == "sft: macro-F1 0.176 on home (n = 4)."
    # All labels of every image: Edema 2/3, Fracture 2/3, No Finding 2/5, so 26/15/14 = 0.124.
    assert "answers without the image, 'all labels', have 0.124" in lead.details[0]


def test_a_step_that_ends_no_better_than_an_answer_without_the_image_is_said_to(tmp_path):
    """Of sft's interval the baseline 0.124 (above) lies inside. Forty answers of which half are
    Edema and half Fracture, all right, are 2/14 = 0.143 in every resample, and all labels of every
    image (2/3 + 2/3) / 14 = 0.095.
    """
    contrast = compared(tmp_path, BEFORE, AFTER)
    low, high = contrast.interval("sft", "macro_f1")
    assert low < 0.124 < high
    line = (
        "sft is not clearly better than answers without the image, macro-F1 on home 'all labels' "
    )
    assert f"{line}0.124" in verdict([contrast], STEP, None).details
    labels = [("Edema",), ("Fracture",)] * 20
    rows = [
        row(answer(*of), of, id=f"i{n}", patient=f"p{n}", evaluated=LABELS)
        for n, of in enumerate(labels)
    ]
    better = verdict([compared(tmp_path, parsed(rows), parsed(rows))], STEP, None)
    assert not any("better" in line for line in better.details)


def test_the_last_step_leads_to_the_last_model():
    pairs = [("base", "sft"), ("sft", "grpo"), ("base", "grpo")]
    assert last_step(["base", "sft", "grpo"], pairs) == ("sft", "grpo")
    assert last_step(["one"], []) is None and last_step([], []) is None


# ---- said in its place ---------------------------------------------------------------------------
def test_what_is_said_in_place_of_a_missed_label_by_hand():
    """Labels A, B, C, and five images.

    1: A true, A said.             A is not missed.
    2: A true, B said.             B in place of A.
    3: A true, B and C said.       B and C in place of A.
    4: A true, nothing said.       A missed, nothing in its place.
    5: A and B true, B said.       A missed; B is true, so it stands in no place. B is not missed.
    6: B true, A and B said.       A is wrong, but nothing is missed.
    7: C true, A said, but A is not evaluated here: nothing in the place of C.
    """
    true = np.array([[1, 0, 0]] * 4 + [[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
    said = np.array(
        [[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]], bool
    )
    evaluated = np.ones_like(true)
    evaluated[6, 0] = False
    counts, alone, support = said_in_place(true, said, evaluated)
    assert support.tolist() == [5, 2, 1]
    assert counts.tolist() == [[1, 2, 1], [0, 2, 0], [0, 0, 0]]  # the diagonal: said where true
    assert alone.tolist() == [2, 0, 1]  # images 4 and 5; image 7


def test_the_diagonal_is_recall_and_rows_are_normalised_by_support(tmp_path):
    """h0 Edema: Edema. h1 Edema, Fracture: Pneumonia. h2 No Finding: failed. h3 Fracture: No
    Finding and Fracture.
    """
    block = heat_map(compared(tmp_path, BEFORE, AFTER), "base")
    assert list(block.columns) == [*LABELS, NOTHING]
    rows = {label: (n, shares) for label, n, shares in block.rows}
    assert list(rows) == ["No Finding", "Edema", "Fracture"]  # those that are true of some image
    at = {label: place for place, label in enumerate(block.columns)}
    n, edema = rows["Edema"]
    assert (n, edema[at["Edema"]], edema[at["Pneumonia"]], edema[at[NOTHING]]) == (2, 0.5, 0.5, 0)
    n, none = rows["No Finding"]
    assert (n, none[at["No Finding"]], none[at[NOTHING]], sum(none)) == (1, 0, 1, 1)
    n, fracture = rows["Fracture"]
    # h3 says Fracture, so its wrong No Finding stands in no place
    assert (n, fracture[at["Fracture"]], fracture[at["Pneumonia"]]) == (2, 0.5, 0.5)
    assert fracture[at["No Finding"]] == 0
    header, briefly = block.briefly
    assert briefly[1] == ["Edema", "2", "50 %", "Pneumonia 50 %"] and len(header) == 4
    contrast = compared(tmp_path, BEFORE, AFTER)
    for model in contrast.answers:
        recall = contrast.values[model]["label_recall"][0]
        for label, _, shares in heat_map(contrast, model).rows:
            assert shares[at[label]] == recall[contrast.labels.index(label)]


# ---- silenced labels -----------------------------------------------------------------------------
def test_a_silenced_label_is_named(tmp_path):
    """Twelve images with Fracture: said of three of them (a quarter: not silenced), then of two."""
    contrast = compared(
        tmp_path,
        rows_of({0: "Fracture", 3: "Edema"}, 12, true=("Fracture",)),
        rows_of({0: "Fracture", 2: "Edema"}, 12, true=("Fracture",)),
    )
    assert silenced_in(contrast, "base") == [] and silenced_in(contrast, "sft") == ["Fracture"]
    table = silenced_table([contrast])
    assert isinstance(table, Table)
    assert [texts(line) for line in table.rows] == [["Fracture", "home", "12", "3", "2"]]
    assert table.rows[0][4] == Cell("2", "silenced", "loss")
    nine = compared(
        tmp_path,
        rows_of({0: "Edema"}, 9, true=("Fracture",)),
        rows_of({0: "Edema"}, 9, true=("Fracture",)),
    )
    assert isinstance(silenced_table([nine]), Text)  # nine true are too few to tell


# ---- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["dumbbell", "labels"])
def test_pictures_are_svg_for_two_widths_and_hold_no_markup_of_names(tmp_path, which):
    contrast = compared(tmp_path, BEFORE, AFTER, "<b>&x")
    picture = labels_picture(contrast) if which == "labels" else dumbbell_picture([contrast], [])
    for data, width in ((picture.data, WIDE), (picture.narrow, NARROW)):
        root = ElementTree.fromstring(data)  # well-formed, so the name is escaped
        assert root.get("width") == str(width)
        shown = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert any("<b>&x" in text for text in shown) and not list(root.iter("b"))
        # nothing is drawn outside of the picture
        for line in root.iter("{http://www.w3.org/2000/svg}line"):
            assert 0 <= float(line.get("x1")) <= width and 0 <= float(line.get("x2")) <= width


def test_the_dumbbell_stands_on_an_axis_from_zero_to_one(tmp_path):
    contrast = compared(tmp_path, BEFORE, AFTER)
    picture = dumbbell_picture([contrast], ["home"])
    root = ElementTree.fromstring(picture.data)
    shown = {
        "".join(text.itertext()): float(text.get("x"))
        for text in root.iter("{http://www.w3.org/2000/svg}text")
    }
    left, right = shown["0"], shown["1"]
    # base 4/3/14, sft 37/15/14
    circle = float(root.find("{http://www.w3.org/2000/svg}circle").get("cx"))
    assert circle == pytest.approx(left + 4 / 3 / 14 * (right - left), abs=0.06)
    [square] = root.iter("{http://www.w3.org/2000/svg}polygon")
    xs = [float(point.split(",")[0]) for point in square.get("points").split()]
    assert np.mean(xs) == pytest.approx(left + 37 / 15 / 14 * (right - left), abs=0.06)
    assert "home, at home, 14 labels" in shown
    assert "base on home 0.095 (" in picture.alt and "sft on home 0.176 (" in picture.alt
