"""Protect the report's tables of votes: each figure stands where its heading says.

Run: pytest tests/eval/test_vote_tables.py
"""

from __future__ import annotations

import json

from eval.folders import load_entry, write_results
from eval.page import Cell
from eval.report import main
from eval.vote_tables import vote_tables
from tests.helpers.reports import BEFORE, FEW, texts

RECORD = {
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
    # a gain is clear where its interval leaves 0 out
    assert gains.rows[0][4] == Cell("+0.100", "+0.050 to +0.150", "gain")
    assert gains.rows[2][4] == Cell("+0.100", "-0.050 to +0.250", "")
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
