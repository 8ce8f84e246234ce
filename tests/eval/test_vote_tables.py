"""Protect the tables of votes and of swapped images: each figure stands under its heading.

Run: pytest tests/eval/test_vote_tables.py
"""

from __future__ import annotations

import json

import eval.plots
from eval.faithfulness_tables import faithfulness_tables
from eval.folders import load_entry, write_results
from eval.page import Cell
from eval.report import main
from eval.vote_tables import threshold_tables, vote_tables
from tests.helpers.reports import BEFORE, FEW, texts

RECORD = {
    "num_patients": 20,
    "macro": {"f1": 0.6},
    "micro": {"f1": 0.7},
    "jaccard": 0.8,
    "samples": {
        "num_generations": 4,
        "mean": {"macro_f1": 0.5, "micro_f1": 0.6, "jaccard": 0.7},
        "best": {"macro_f1": 0.9, "micro_f1": 0.91, "jaccard": 0.92},
        "vote_gain": {"macro_f1": 0.1, "micro_f1": 0.1, "jaccard": 0.1},
        "intervals": {
            "mean": {"macro_f1": [0.4, 0.55]},
            "best": {"macro_f1": [0.8, 0.95]},
            "vote_gain": {"macro_f1": [0.05, 0.15], "jaccard": [-0.05, 0.25]},
        },
    },
    "probabilities": {
        "per_label": {
            "Edema": {
                "auroc": 0.75,
                "auroc_interval": [0.7, 0.8],
                "auprc": 0.5,
                "auprc_interval": [0.4, 0.6],
                "prevalence": 0.25,
            },
            "Fracture": {"auroc": None, "auprc": None, "prevalence": 0.0},
        },
        "macro_auroc": 0.75,
        "macro_auroc_interval": [0.7, 0.8],
        "macro_auprc": 0.5,
        "ece": 0.03,
        "reliability": [
            {"low": 0.0, "high": 0.1, "n": 3, "confidence": 0.0, "observed": 0.0},
            {"low": 0.9, "high": 1.0, "n": 1, "confidence": 1.0, "observed": 1.0},
        ],
    },
}

POINTS = {
    "from": "home",
    "shared_patients": 3,
    "num_patients": 20,
    "per_label": {
        "Edema": {"threshold": 0.25, "before": 0.5, "after": 0.75},
        "Fracture": {"threshold": 0.5, "before": 0.25, "after": 0.25},
    },
    "not_chosen": ["Fracture"],
    "before": {"micro_f1": 0.7, "macro_f1": 0.375},
    "after": {"micro_f1": 0.65, "macro_f1": 0.5},
    "difference": {"micro_f1": [-0.12, 0.02], "macro_f1": [0.05, 0.2]},
}
FAITHFULNESS = {
    "n": 4,
    "same_truth": 0.125,
    "own": {"jaccard": 0.75, "micro_f1": 0.8, "macro_f1": 0.6},
    "swapped": {"jaccard": 0.25, "micro_f1": 0.3, "macro_f1": 0.2},
    "difference": {"jaccard": -0.5, "micro_f1": -0.5, "macro_f1": -0.4},
    "difference_intervals": {"jaccard": [-0.6, -0.4], "macro_f1": [-0.5, -0.3]},
    "answers_unchanged": {"mean": 0.14, "interval": [0.08, 0.19], "n": 4},
    "labels_changed": {"mean": 2.5, "interval": [2, 3], "n": 4},
    "reasoning_unchanged": {"mean": 0.05, "interval": [0.02, 0.09], "n": 4},
    "stated_not_answered": {"mean": 0.0, "interval": [0.0, 0.0], "n": 3},
    "answered_not_mentioned": {"mean": None, "interval": None, "n": 0},
}


def test_the_tables_of_a_vote(tmp_path):
    (tmp_path / "vote").mkdir()
    write_results(tmp_path / "vote", "home", BEFORE, RECORD)
    entry = load_entry("SFT + vote of 4", tmp_path / "vote")
    [gains], [by_label] = vote_tables([entry])
    assert [texts(row) for row in gains.rows] == [
        ["SFT + vote of 4, macro-F1", "home", "0.500", "0.600", "+0.100", "0.900"],
        ["SFT + vote of 4, micro-F1", "home", "0.600", "0.700", "+0.100", "0.910"],
        ["SFT + vote of 4, Jaccard", "home", "0.700", "0.800", "+0.100", "0.920"],
    ]
    # a gain is clear where its interval leaves 0 out and rests on 20 patients
    assert gains.rows[0][4] == Cell("+0.100", "+0.050 to +0.150", "gain")
    assert gains.rows[2][4] == Cell("+0.100", "-0.050 to +0.250", "")
    write_results(tmp_path / "vote", "home", BEFORE, RECORD | {"num_patients": 19}, overwrite=True)
    [few], _ = vote_tables([load_entry("vote", tmp_path / "vote")])
    assert few.rows[0][4] == Cell("+0.100", "+0.050 to +0.150", "")
    assert by_label.header[2:] == ["SFT + vote of 4, AUROC", "SFT + vote of 4, AUPRC"]
    assert [texts(row) for row in by_label.rows] == [
        ["Edema", "25.0 %", "0.750", "0.500"],
        ["Fracture", "0.0 %", "-", "-"],  # without positives there is nothing to rank
        ["mean of the labels", "", "0.750", "0.500"],
    ]
    assert vote_tables([]) == ([], [])
    # a record of another version shows what it has
    write_results(tmp_path / "vote", "home", BEFORE, {"samples": {"mean": 0.5}}, overwrite=True)
    [gains], none = vote_tables([load_entry("old", tmp_path / "vote")])
    assert texts(gains.rows[0])[2:] == ["-"] * 4 and none == []


def test_a_report_shows_the_votes_and_their_reliability(tmp_path):
    (tmp_path / "vote").mkdir()
    write_results(tmp_path / "vote", "home", BEFORE, RECORD)
    assert main([str(tmp_path / "vote"), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Votes as probabilities</h2>" in page
    assert (
        "Samples, their vote, and the best of them" in page and "AUROC and AUPRC by label" in page
    )
    assert "calibration error 0.030" in page  # the picture's alternative text
    # an old record without it has no such section
    (tmp_path / "vote" / "scores-home.json").write_text(json.dumps({}))
    assert main([str(tmp_path / "vote"), "--output_dir", str(tmp_path / "old"), *FEW]) == 0
    assert "Votes as probabilities<" not in (tmp_path / "old" / "report.html").read_text(
        encoding="utf-8"
    )


def test_thresholds_that_were_carried(tmp_path):
    record = RECORD | {"probabilities": RECORD["probabilities"] | {"operating_points": POINTS}}
    (tmp_path / "vote").mkdir()
    write_results(tmp_path / "vote", "nih", BEFORE, record)
    [whole], [by_label] = threshold_tables([load_entry("vote", tmp_path / "vote")])
    # 0.5 - 0.375 and 0.65 - 0.7
    assert [texts(row) for row in whole.rows] == [
        ["vote, macro-F1", "nih", "home", "0.375", "0.500", "+0.125"],
        ["vote, micro-F1", "nih", "home", "0.700", "0.650", "-0.050"],
    ]
    assert whole.rows[0][2] == Cell("home", "3 shared patients")
    # patients who chose the thresholds are judged with them, so it is not set off as a gain
    assert whole.rows[0][5] == Cell("+0.125", "+0.050 to +0.200", "")
    assert whole.rows[1][5] == Cell("-0.050", "-0.120 to +0.020", "")
    assert [texts(row) for row in by_label.rows] == [
        ["Edema", "0.250", "0.500", "0.750"],
        ["Fracture", "0.500", "0.250", "0.250"],
    ]
    assert by_label.notes[0].endswith("left at one half: Fracture.")
    assert main([str(tmp_path / "vote"), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    folded = page.index("<summary>Thresholds by label")
    assert page.index("Thresholds carried from one data set to another") < folded
    assert folded < page.index("vote on nih, thresholds of home")
    points = {"operating_points": POINTS | {"shared_patients": 0}}
    write_results(tmp_path / "vote", "nih", BEFORE, {"probabilities": points}, overwrite=True)
    [whole], _ = threshold_tables([load_entry("vote", tmp_path / "vote")])
    assert whole.rows[0][2] == Cell("home", "")
    assert whole.rows[0][5] == Cell("+0.125", "+0.050 to +0.200", "gain")
    points = {"operating_points": POINTS | {"shared_patients": 0, "num_patients": 19}}
    write_results(tmp_path / "vote", "nih", BEFORE, {"probabilities": points}, overwrite=True)
    [few], _ = threshold_tables([load_entry("vote", tmp_path / "vote")])
    assert few.rows[0][5] == Cell("+0.125", "+0.050 to +0.200", "")
    # votes without thresholds of another set, and a record of another version
    write_results(tmp_path / "vote", "nih", BEFORE, RECORD, overwrite=True)
    assert threshold_tables([load_entry("vote", tmp_path / "vote")]) == ([], [])
    old = {"probabilities": {"operating_points": {"from": "home"}}}
    write_results(tmp_path / "vote", "nih", BEFORE, old, overwrite=True)
    [whole], _ = threshold_tables([load_entry("vote", tmp_path / "vote")])
    assert texts(whole.rows[0])[3:] == ["-", "-", "-"]


def test_what_swapped_images_change(tmp_path):
    (tmp_path / "swap").mkdir()
    write_results(tmp_path / "swap", "home", BEFORE, {"faithfulness": FAITHFULNESS})
    scores, shares = faithfulness_tables([load_entry("SFT", tmp_path / "swap")])
    assert [texts(row) for row in scores.rows] == [
        ["SFT", "home", "0.750", "0.250", "-0.500", "0.600", "0.200", "-0.400"]
    ]
    # that another's image gives less is no loss of the model
    assert scores.rows[0][4] == Cell("-0.500", "-0.600 to -0.400", "")
    assert shares.rows == [
        [
            *("SFT", "home", "12.5 %"),
            Cell("14.0 %", "8.0 % to 19.0 %"),
            Cell("5.0 %", "2.0 % to 9.0 %"),
            Cell("0.0 %", "0.0 % to 0.0 %"),
            Cell("-"),  # no answer has any reasoning
        ]
    ]
    assert main([str(tmp_path / "swap"), "--output_dir", str(tmp_path / "out"), *FEW]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Does the answer come from the image?</h2>" in page
    write_results(tmp_path / "swap", "home", BEFORE, {}, overwrite=True)
    assert faithfulness_tables([load_entry("SFT", tmp_path / "swap")]) == []


def test_without_matplotlib_a_report_says_once_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.report.available", lambda: False)
    for record, what in ((RECORD, "training and of the votes' reliability"), ({}, "training")):
        folder = tmp_path / what[-6:]
        folder.mkdir()
        write_results(folder, "home", BEFORE, record)
        assert main([str(folder), "--output_dir", str(folder / "out"), *FEW]) == 0
        text = (folder / "out" / "report.md").read_text(encoding="utf-8")
        assert f"Without pictures of {what}: {eval.plots.MISSING[:30]}" in text
        assert text.count("Without pictures") == 1
