"""Protect the comparison of home and elsewhere on the same labels.

Checked by hand: macro-F1 on all labels and on shared ones, their gap and its standard error, the
cases without a shared label or with several sets a side, and the paper's own figures.

Run: pytest tests/eval/test_transfer.py
"""

from __future__ import annotations

import numpy as np
import pytest

from data.labels import LABELS, NIH_NINE
from eval import published
from eval.compare import differences_table
from eval.contrasts import Contrast, contrast_models, transfers
from eval.folders import load_answers
from eval.paired import holm
from eval.report import headlines
from eval.tables import movers_table, p_text
from eval.transfer import (
    Moved,
    gap_on_all_labels,
    gap_on_shared_labels,
    home_on_its_own_labels,
    shared_labels,
)
from eval.transfer_tables import matched_table, paradox_table, transfer_table
from tests.helpers.reports import (
    AFTER,
    BEFORE,
    NIH_AFTER,
    NIH_BEFORE,
    compared,
    line_of,
    texts,
)


def moved(name: str, before: dict[str, float], after: dict[str, float], *, shift=()) -> Moved:
    """Make a data set's F1 by label, with a resample for each of `shift`, which adds to after."""
    first, second = (np.array(list(f1.values())) for f1 in (before, after))
    drawn = [np.tile(f1, (len(shift) or 1, 1)) for f1 in (first, second)]
    return Moved(
        name, tuple(before), first, second, drawn[0], drawn[1] + np.array(shift or [0.0])[:, None]
    )


HOME = moved("home", {"Edema": 0.5, "Fracture": 0.2}, {"Edema": 0.4, "Fracture": 0.8})
AWAY = moved("away", {"Edema": 0.5}, {"Edema": 0.45})


def test_all_labels_and_shared_labels_by_hand():
    # Home, all labels: (0.5 + 0.2) / 2 = 0.35 to (0.4 + 0.8) / 2 = 0.6, +0.25. Away -0.05. So 0.3
    # of gap, all of which is Fracture: on Edema alone home loses 0.1 and away 0.05.
    found = gap_on_all_labels([HOME], [AWAY])
    assert found.home.before == pytest.approx(0.35) and found.home.after == pytest.approx(0.6)
    assert found.value == pytest.approx(0.3)
    found = gap_on_shared_labels([HOME], [AWAY])
    assert (found.home.before, found.home.after) == (0.5, 0.4)
    assert found.value == pytest.approx(-0.05)
    own = home_on_its_own_labels([HOME], [AWAY])
    assert (own.before, own.after) == (0.2, 0.8)


def test_the_standard_error_is_that_of_the_resampled_gaps():
    home = moved("home", {"Edema": 0.5}, {"Edema": 0.5}, shift=(0.1, -0.1, 0.3, 0.1))
    away = moved("away", {"Edema": 0.5}, {"Edema": 0.5}, shift=(0.0, 0.2, 0.0, 0.2))
    # Gaps of the four resamples: 0.1, -0.3, 0.3, -0.1. Mean 0, squares 0.01 + 0.09 + 0.09 + 0.01 =
    # 0.2, a quarter of it 0.05.
    found = gap_on_shared_labels([home], [away])
    assert found.drawn == pytest.approx([0.1, -0.3, 0.3, -0.1])
    assert found.standard_error == pytest.approx(0.05**0.5)


def test_sets_with_the_same_labels_have_one_gap():
    other = moved("away", {"Fracture": 0.3, "Edema": 0.1}, {"Fracture": 0.2, "Edema": 0.5})
    # whatever the order of the labels: +0.25 at home, (0.2 + 0.5 - 0.3 - 0.1) / 2 = +0.15 away
    for gap in (gap_on_all_labels, gap_on_shared_labels):
        assert gap([HOME], [other]).value == pytest.approx(0.1)
    assert home_on_its_own_labels([HOME], [other]) is None


def test_several_sets_are_compared_pair_by_pair():
    fracture = moved("bones", {"Fracture": 0.5}, {"Fracture": 0.6})
    # Edema: home -0.1, away -0.05. Fracture: home +0.6, bones +0.1. Means +0.25 and +0.025.
    found = gap_on_shared_labels([HOME], [AWAY, fracture])
    assert found.home.difference == pytest.approx(0.25)
    assert found.away.difference == pytest.approx(0.025)
    assert found.value == pytest.approx(0.225)
    # A set that shares nothing takes part in the gap on all labels alone.
    nothing = moved("other", {"Pneumonia": 0.5}, {"Pneumonia": 0.9})
    assert gap_on_shared_labels([HOME], [AWAY, nothing]).value == pytest.approx(-0.05)
    assert gap_on_all_labels([HOME], [AWAY, nothing]).value == pytest.approx(0.25 - 0.175)


def test_a_side_without_a_set_or_a_shared_label_has_no_gap():
    nothing = moved("other", {"Pneumonia": 0.5}, {"Pneumonia": 0.9})
    assert gap_on_shared_labels([HOME], [nothing]) is None
    assert home_on_its_own_labels([HOME], [nothing]).before == pytest.approx(0.35)
    for gap in (gap_on_all_labels, gap_on_shared_labels):
        assert gap([HOME], []) is None and gap([], [AWAY]) is None
    assert shared_labels(LABELS, NIH_NINE) == NIH_NINE and shared_labels("ab", "c") == ()


# ---- the paper's own figures ---------------------------------------------------------------------
def test_the_papers_gain_lies_in_the_labels_that_nih_cannot_express():
    # SFT, the nine: .229 + .442 + .205 + .385 + .211 + .579 + .000 + .143 + .179 = 2.373, / 9.
    # ChexReason: .240 + .664 + .000 + .132 + .133 + .607 + .000 + .400 + .286 = 2.462.
    # The other five: .075 + .150 + .161 + .464 + .728 = 1.578, / 5; .000 + .200 + .743 + .625 +
    # .818 = 2.386.
    sft, rl = (published.TABLE_5[name] for name in ("MedGemma (SFT)", "MedGemma (ChexReason)"))
    rest = [label for label in LABELS if label not in NIH_NINE]
    assert published.macro_f1(sft, NIH_NINE) == pytest.approx(2.373 / 9)
    assert published.macro_f1(rl, NIH_NINE) == pytest.approx(2.462 / 9)
    assert published.macro_f1(sft, rest) == pytest.approx(1.578 / 5)
    assert published.macro_f1(rl, rest) == pytest.approx(2.386 / 5)
    lines = {texts(line)[0]: line for line in matched_table([]).rows}
    step = "paper: MedGemma (SFT) \u2192 MedGemma (ChexReason)"
    nine, other = lines[f"{step}, 9 shared labels"], lines[f"{step}, the other 5 labels"]
    # 2.462 - 2.373 = 0.089, / 9; +4 %. NIH by its Table 6: 2.688 to 2.189, / 9.
    assert texts(nine)[1:4] == ["+0.010", "-0.055", "+0.065"]
    assert nine[1].detail == "0.264 to 0.274, +4 %"
    assert nine[2].detail == "0.299 to 0.243, -19 %"
    assert texts(other)[1:4] == ["+0.162", "", ""] and other[1].detail == "0.316 to 0.477, +51 %"


# ---- ours, in the report -------------------------------------------------------------------------
@pytest.fixture
def found(tmp_path) -> list[Contrast]:
    return [
        compared(tmp_path, BEFORE, AFTER, "home"),
        compared(tmp_path, NIH_BEFORE, NIH_AFTER, "nih"),
    ]


def test_ours_on_the_same_labels_by_hand(found):
    # Home: base Edema 2/3, Fracture 2/3, others 0; sft Edema 4/5, Fracture 2/3, No Finding 1. On
    # the nine: 2/3 / 9 = 0.074 to 9/5 / 9 = 0.2, +0.126. The other five: Fracture alone, unchanged.
    # NIH: 2/9 to 2/27, -0.148.
    [transfer] = transfers(found, ["home"], [("base", "sft")])
    assert transfer.labels == {("home", "nih"): NIH_NINE} and not transfer.same_labels
    assert transfer.home_shared.before == pytest.approx(2 / 27)
    assert transfer.home_shared.after == pytest.approx(0.2)
    # NIH has no other labels
    assert transfer.away_shared.after == pytest.approx(transfer.away.after) == 2 / 27
    assert transfer.gap_shared[0] == pytest.approx(0.2 - 2 / 27 + 4 / 27)
    assert (transfer.home_only.before, transfer.home_only.after) == pytest.approx((2 / 15, 2 / 15))
    table = matched_table([transfer])
    assert texts(table.rows[0])[:4] == [
        "base \u2192 sft, 9 shared labels",
        "+0.126",
        "-0.148",
        "+0.274",
    ]
    assert texts(table.rows[1])[:3] == ["base \u2192 sft, labels only at home", "+0.000", ""]
    assert f"Shared by home and nih: {', '.join(NIH_NINE)}." in table.notes
    # the table of all labels stays as it was
    assert texts(paradox_table([transfer]).rows[0])[1:4] == ["+0.081", "-0.148", "+0.229"]
    [line] = headlines([transfer])
    assert (
        "in distribution +0.081" in line
        and "On the 9 shared labels: in distribution +0.126" in (line)
    )


def test_the_table_of_changes_has_a_row_for_the_shared_labels(found):
    table = transfer_table(found, ["home"], [("base", "sft")])
    assert [texts(line)[1] for line in table.rows] == ["home", "home, 9 shared with nih", "nih"]
    assert line_of(table, "base \u2192 sft", "home, 9 shared with nih")[2:7] == [
        "in distribution",
        "0.074",
        "0.200",
        "+0.126",
        "+170.0 %",
    ]


def test_a_change_on_some_labels_is_that_of_a_contrast_on_them(tmp_path, found):
    answers = {name: load_answers(tmp_path / f"{name}.jsonl") for name in ("base", "sft")}
    nih = found[1]
    alone = contrast_models(
        "nih", answers, [("base", "sft")], labels=NIH_NINE[:4], resamples=200, permutations=200
    )
    some, whole = (
        nih.macro_change("base", "sft", NIH_NINE[:4]),
        nih.change("base", "sft", "macro_f1"),
    )
    assert some == alone.change("base", "sft", "macro_f1")
    assert some.difference != whole.difference  # Edema and Lung Lesion of four labels, not of nine
    assert nih.macro_change("base", "sft", NIH_NINE) == whole


def test_every_table_of_several_comparisons_is_adjusted_by_holm(found):
    # Raw p-values of the table's own comparisons, adjusted together; those of labels without
    # positives are no comparisons.
    home, nih = found
    label = {name: home.label_change("base", "sft", name).p_value for name in home.labels}
    tested = [name for name, count in zip(home.labels, home.support, strict=True) if count]
    adjusted = dict(zip(tested, holm([label[name] for name in tested]), strict=True))
    movers = movers_table(home, "base", "sft")
    for line in movers.rows:
        name, cell = texts(line)[0], line[-1]
        assert cell.text == (p_text(adjusted[name]) if name in tested else "-")
        assert cell.detail == (f"alone {p_text(label[name])}" if name in tested else "")
    assert "for the 3 comparisons" in movers.notes[0]
    raw = [
        home.change("base", "sft", "macro_f1").p_value,
        home.macro_change("base", "sft", NIH_NINE).p_value,
        nih.change("base", "sft", "macro_f1").p_value,
    ]
    table = transfer_table(found, ["home"], [("base", "sft")])
    assert [line[-1].text for line in table.rows] == [p_text(p) for p in holm(raw)]
    scores = ("macro_f1", "micro_f1", "jaccard")
    raw = [home.change("base", "sft", score).p_value for score in scores]
    table = differences_table(home, "base")
    assert [line[-1].text for line in table.rows] == [p_text(p) for p in holm(raw)]
    assert all(
        one.header[-1] == "p (Holm)" and "answer alike" in one.notes[-1] for one in (movers, table)
    )


def test_sides_with_the_same_labels_need_no_second_line(tmp_path):
    both = [compared(tmp_path, BEFORE, AFTER, name) for name in ("home", "other")]
    [transfer] = transfers(both, ["home"], [("base", "sft")])
    assert transfer.same_labels and transfer.home_only is None
    assert transfer.gap_shared[0] == pytest.approx(transfer.gap[0])
    assert "shared labels" not in headlines([transfer])[0]
    assert [texts(line)[1] for line in transfer_table(both, ["home"], [("base", "sft")]).rows] == [
        "home",
        "other",
    ]
