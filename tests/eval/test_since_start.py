"""Protect what a training run says of its evaluations against its own start.

Checked by hand: changes and gaps with their standard errors, the first evaluation, one set, sets
that share no label, and a run whose start is missing, damaged or of other images.

Run: pytest tests/eval/test_since_start.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data.predictions import Prediction
from eval.folders import load_entry, write_results
from eval.scores import score
from eval.since_start import keep_start, since_start
from tests.helpers.reports import (
    AFTER,
    BEFORE,
    NIH_AFTER,
    NIH_BEFORE,
    answer,
    parsed,
    row,
    save,
    training_run,
)


def run_of(tmp_path: Path, start: dict, now: dict) -> Path:
    """Make the folder of a run with answers of its start and of now, by data set."""
    run = training_run(tmp_path / "run", "grpo")
    save(run, **start)
    keep_start(run, list(start))
    for name, rows in now.items():
        write_results(run, name, rows, score(rows), overwrite=True)
    return run


BOTH = {"home": BEFORE, "nih": NIH_BEFORE}


def test_changes_and_gaps_by_hand(tmp_path):
    found = since_start(run_of(tmp_path, BOTH, {"home": AFTER, "nih": NIH_AFTER}), ["home", "nih"])
    # Home, 14 labels: (2/3 + 2/3) / 14 to (4/5 + 2/3 + 1) / 14. On NIH's nine: Edema 2/3 to 4/5,
    # No Finding 0 to 1: 2/27 to 1/5. NIH: 2/9 to 2/27.
    home, nih = found.rows
    assert home["since_start"]["macro_f1"]["difference"] == pytest.approx(17 / 15 / 14)
    assert nih["since_start"]["macro_f1"]["difference"] == pytest.approx(-4 / 27)
    # Jaccard by image: 1, 0, 0, 1/2 to 1, 1, 1, 0
    assert home["since_start"]["jaccard"]["difference"] == pytest.approx(0.75 - 0.375)
    assert (home["dataset"], home["n"], nih["n"]) == ("home", 4, 3)
    assert found.gaps["gap"] == pytest.approx(17 / 15 / 14 + 4 / 27)
    assert found.gaps["gap_shared"] == pytest.approx(1 / 5 - 2 / 27 + 4 / 27)
    assert found.gaps["gap_se"] > 0 and found.gaps["gap_shared_se"] > 0 and not found.notes
    # both sides on NIH's nine: the mean of +17/135 and -4/27
    assert found.gaps["gain_shared"] == pytest.approx((1 / 5 - 2 / 27 - 4 / 27) / 2)
    assert home["since_start"]["macro_f1_shared"]["difference"] == pytest.approx(1 / 5 - 2 / 27)
    assert (home["shared_labels"], home["num_labels"], nih["num_labels"]) == ([9, 9], 14, 9)
    assert "shared_labels" not in nih  # home can express all of its labels


def test_home_is_set_beside_fewer_labels_on_those_alone(tmp_path):
    """A second set of the same hospital has all labels, and takes no part in the shared ones."""
    start, now = BOTH | {"again": BEFORE}, {"home": AFTER, "nih": NIH_AFTER, "again": AFTER}
    home, again, nih = since_start(run_of(tmp_path, start, now), ["home", "again", "nih"]).rows
    assert home["shared_labels"] == [9, 9]
    assert home["since_start"]["macro_f1_shared"]["difference"] == pytest.approx(1 / 5 - 2 / 27)
    assert not {"shared_labels"} & (again.keys() | nih.keys())


def rows_of(site: str, evaluated, said: list[str]) -> list[Prediction]:
    """Make an answer an image, two images a patient, of which Edema is true."""
    return parsed(
        [
            row(answer(text), ("Edema",), id=f"{site}{n}", patient=f"{n // 2}", evaluated=evaluated)
            for n, text in enumerate(said)
        ]
    )


def test_standard_errors_are_of_the_same_patients_before_and_after(tmp_path):
    # Each site has 40 patients of two images and one label. At the start of home all patients are
    # missed, now half of them are found: F1 is 2 f / (1 + f) of the share f that is found. Nothing
    # moves away. The oracle draws 40 patients anew and again.
    said = ["Edema" if n // 2 % 2 else "Fracture" for n in range(80)]
    start = {
        "home": rows_of("h", ("Edema",), ["Fracture"] * 80),
        "away": rows_of("a", ("Edema",), said),
    }
    found = since_start(
        run_of(tmp_path, start, {"home": rows_of("h", ("Edema",), said)}), ["home", "away"]
    )
    share = np.random.default_rng(3).binomial(40, 0.5, size=20_000) / 40
    expected = (2 * share / (1 + share)).std()
    assert found.gaps["gap_se"] == pytest.approx(expected, rel=0.1)
    assert found.gaps["gap_shared_se"] == found.gaps["gap_se"]
    assert found.gaps["gap_shared"] == pytest.approx(2 / 3)  # f = 1/2
    low, high = found.rows[0]["since_start"]["macro_f1"]["interval"]
    assert low < 2 / 3 < high and found.rows[1]["since_start"]["macro_f1"]["interval"] == [0, 0]


def test_the_two_sites_are_drawn_apart(tmp_path):
    """Sites whose answers move alike image by image have independent errors, which add up."""
    said = ["Edema" if n // 2 % 2 else "Fracture" for n in range(80)]
    start = {name: rows_of(name, ("Edema",), ["Fracture"] * 80) for name in ("home", "away")}
    now = {name: rows_of(name, ("Edema",), said) for name in ("home", "away")}
    found = since_start(run_of(tmp_path, start, now), ["home", "away"])
    share = np.random.default_rng(3).binomial(40, 0.5, size=(2, 20_000)) / 40
    home, away = 2 * share / (1 + share)
    assert found.gaps["gain_shared"] == pytest.approx(2 / 3)  # both gain from 0 to F1 of f = 1/2
    error = found.gaps["gain_shared_se"]
    assert error == pytest.approx(((home + away) / 2).std(), rel=0.1)
    assert found.gaps["gap_shared"] == 0
    assert found.gaps["gap_se"] == pytest.approx((home - away).std(), rel=0.1)


def test_at_the_start_nothing_has_changed(tmp_path):
    found = since_start(run_of(tmp_path, BOTH, {}), ["home", "nih"])
    of_all = ("gap", "gap_se", "gap_shared", "gap_shared_se", "gain_shared", "gain_shared_se")
    assert found.gaps == dict.fromkeys(of_all, 0.0)
    for line in found.rows:
        for change in line["since_start"].values():
            assert change == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_one_set_has_changes_and_no_gap(tmp_path):
    found = since_start(run_of(tmp_path, {"home": BEFORE}, {"home": AFTER}), ["home"])
    assert found.gaps == {} and found.notes == [] and len(found.rows) == 1
    assert since_start(tmp_path / "run", []) == since_start(tmp_path / "nowhere", ["home"])


def test_several_sets_with_different_labels(tmp_path):
    # Home moves by +17/15 over 14 labels. Away sets: NIH, and one of Fracture alone, whose answers
    # do not change. Shared with it: Fracture, unchanged at home (2/3). So the pairs give home 17/15
    # / 9 and 0, away -4/27 and 0.
    bones = rows_of("b", ("Fracture",), ["Fracture", "Edema"])
    found = since_start(
        run_of(
            tmp_path,
            BOTH | {"bones": bones},
            {"home": AFTER, "nih": NIH_AFTER},
        ),
        ["home", "nih", "bones"],
    )
    assert found.gaps["gap_shared"] == pytest.approx((17 / 15 / 9) / 2 + (4 / 27) / 2)


def test_a_set_of_one_patient_has_no_standard_error_and_says_so(tmp_path):
    start = {
        "home": [dataclasses.replace(row, patient_id="p") for row in BEFORE],
        "nih": NIH_BEFORE,
    }
    found = since_start(run_of(tmp_path, start, {}), ["home", "nih"])
    assert found.gaps == {
        "gap": 0.0,
        "gap_shared": 0.0,
        "gain_shared": 0.0,
    }  # a condition on gap_shared_se cannot come true
    assert found.notes == [
        "home: all images are of one patient, so gap_se, gap_shared_se, gain_shared_se are not"
        " measured"
    ]


def test_sets_that_share_no_label_have_no_shared_gap_and_say_so(tmp_path):
    start = {
        "home": rows_of("h", ("Edema",), ["Edema"] * 4),
        "away": rows_of("a", ("Fracture",), ["Edema"] * 4),
    }
    found = since_start(run_of(tmp_path, start, {}), ["home", "away"])
    assert set(found.gaps) == {"gap", "gap_se"}
    assert found.notes == [
        "home shares no label with away, so gap_shared, gain_shared and their errors are not"
        " measured"
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is missing; the run was begun by an earlier version"),
        ("torn", "predictions-home.jsonl, line 4: not valid JSON"),
        ("other images", "answers other images than"),
        ("other labels", "has other labels than"),
    ],
)
def test_without_a_sound_start_a_line_says_what_is_not_measured(tmp_path, damage, message):
    run = run_of(tmp_path, BOTH, {"home": AFTER, "nih": NIH_AFTER})
    file = run / "start/predictions-home.jsonl"
    text = file.read_text()
    if damage == "missing":
        file.unlink()
    elif damage == "torn":
        file.write_text(text[:-20])
    elif damage == "other images":
        file.write_text(text.replace('"id": "h3"', '"id": "h9"'))
    else:
        file.write_text(text.replace('"labels": ["No Finding"]', '"labels": []'))
    found = since_start(run, ["home", "nih"])
    [note] = found.notes
    assert note.startswith("home: nothing is compared with the start, so there is no gap: ")
    assert message in note and found.gaps == {}
    assert found.rows[0]["since_start"] == {} and found.rows[1]["since_start"]


def test_the_vote_over_the_start_is_decoded_once(tmp_path):
    run = training_run(tmp_path / "grpo", "grpo")
    save(run, home=BEFORE)
    places: list[Path] = []
    for _ in range(2):  # the last evaluation is of step 0 again where that is the best
        keep_start(run, ["home"], places.append)
    assert len(places) == 1 and (run / "start-vote").is_dir()


def test_the_start_says_which_model_answered(tmp_path):
    run = training_run(tmp_path / "grpo", "grpo")
    sft = training_run(tmp_path / "sft", "sft")
    config = json.loads((run / "config.json").read_text())
    config["settings"]["adapter_name_or_path"] = {"value": str(sft), "origin": "flag"}
    (run / "config.json").write_text(json.dumps(config))
    write_results(run, "home", BEFORE, score(BEFORE) | {"step": 0})
    (run / "start").mkdir()
    (run / "start/left-over").write_text("of an evaluation that was cut short")
    keep_start(run, ["home"])
    entry = load_entry("any name", run / "start")
    assert (entry.stage, entry.training, entry.prompt) == ("sft", sft, "demo")
    assert sorted(path.name for path in (run / "start").iterdir()) == [
        "predictions-home.jsonl",
        "scores-home.json",
    ]
    # the step is of this run
    assert "step" not in json.loads((run / "start/scores-home.json").read_text())
    # rows as they were, with what the run added to them
    assert (run / "start/predictions-home.jsonl").read_bytes() == (
        run / "predictions-home.jsonl"
    ).read_bytes()
    keep_start(run, [])  # a run without data sets to evaluate
    assert (run / "start").is_dir()
